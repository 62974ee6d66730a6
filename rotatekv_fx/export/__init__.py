"""A transformed model as one ONNX graph, and what runs it on onnxruntime.

`onnx` exports and needs torch; `generation` and `schema` run without it.
"""
