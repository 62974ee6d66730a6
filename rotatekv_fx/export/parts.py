"""Parts of the graph that all layers share: an op of our own while the model is traced, exported once.

Tracing is slow, and slower with every symbolic size; the exporter's own functions for conditions trace each
branch many times. So the model is traced with one op in the place of each part; the parts are exported by
themselves, and each op is replaced by the nodes of its part, or by an `If` with one part a branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from rotatekv_fx.export.state import State

DOMAIN = "rotatekv_fx.export"
_OF_SIZES = (
    "Squeeze",
    "Unsqueeze",
    "Reshape",
    "Add",
    "Sub",
    "Mul",
    "Max",
    "Min",
    "Concat",
    "Gather",
    "Identity",
)
Function = Callable[[Any, State], Tensor | tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Part:
    """`then(form, tensors)`; or, where a condition does not hold, `other(form, tensors)`."""

    form: Any
    then: Function
    other: Function | None = None


class Parts:
    """The parts of one export.

    Attributes:
        single: the symbol of a size that is 1 where a part's second function runs, once it is known.
    """

    def __init__(self) -> None:
        self.single: torch.SymInt | None = None
        self._made: dict[tuple[Any, ...], tuple[str, Part, State]] = {}

    def call(
        self,
        part: Part,
        tensors: State,
        outputs: Sequence[tuple[torch.dtype, Sequence[int]]],
        condition: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Trace a part.

        Args:
            tensors: what it reads; sizes that may vary are symbols.
            outputs: dtype and shape of each result.
            condition: bool [], where the part has two functions.
        """
        sizes = tuple((n, t.dtype, *(_fixed(d) for d in t.shape)) for n, t in tensors.items())
        name, _, _ = self._made.setdefault((part, sizes), (f"Part{len(self._made)}", part, tensors))
        return torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            (*(() if condition is None else (condition,)), *tensors.values()),
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[shape for _, shape in outputs],
            version=1,
        )

    def put_into(self, model: onnx.ModelProto, opset: int) -> None:
        """Replace the ops by their parts' nodes."""
        exported = {
            name: [_export(part.then, part.form, tensors, opset, None)]
            + ([] if part.other is None else [_export(part.other, part.form, tensors, opset, self.single)])
            for name, part, tensors in self._made.values()
        }
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for index, node in enumerate(nodes):
            if node.domain == DOMAIN:
                model.graph.node.extend(_nodes_of(node, exported[node.op_type], f"{node.op_type}_{index}"))
            else:
                model.graph.node.append(node)
        _share_sizes(model.graph)
        kept = [o for o in model.opset_import if o.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def _share_sizes(graph: onnx.GraphProto) -> None:
    """Compute each size once: arithmetic on the sizes of the graph's inputs leaves the branches of an `If`,
    equal sizes are read off one input, and what is equal is computed once.
    """
    places: dict[str, tuple[str, int]] = {}  # of the symbolic sizes among the inputs'
    symbols = {}
    for one in graph.input:
        dims = [d.dim_param for d in one.type.tensor_type.shape.dim]
        symbols[one.name] = dims
        for axis, symbol in enumerate(dims):
            places.setdefault(symbol, (one.name, axis))
    numbers = {n for n, dims in symbols.items() if len(dims) == 1}  # tensors to compute with
    made: dict[tuple[object, ...], list[str]] = {}
    renamed: dict[str, str] = {}

    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) < 2:
            numbers.add(tensor.name)
            value = numpy_helper.to_array(tensor)
            renamed[tensor.name] = made.setdefault((value.shape, value.tobytes()), [tensor.name])[0]

    def key_of(node: onnx.NodeProto) -> tuple[object, ...] | None:
        """What a node computes, if it is part of that arithmetic."""
        if node.op_type == "Constant":
            value = numpy_helper.to_array(node.attribute[0].t) if node.attribute[0].name == "value" else None
            fits = value is not None and value.dtype == np.int64 and value.ndim < 2
            return (value.shape, value.tobytes()) if fits else None
        attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
        if node.op_type == "Shape" and node.input[0] in symbols:
            bounds = {a.name: a.i for a in node.attribute}
            start = bounds.get("start", 0)
            if bounds.get("end") == start + 1 and symbols[node.input[0]][start]:
                name, axis = places[symbols[node.input[0]][start]]
                node.CopyFrom(
                    helper.make_node("Shape", [name], node.output, node.name, start=axis, end=axis + 1)
                )
                return "Shape", name, axis
            return "Shape", node.input[0], attributes
        fits = node.op_type in _OF_SIZES and all(n in numbers for n in node.input)
        return (node.op_type, *node.input, attributes) if fits else None

    def keep(
        nodes: list[onnx.NodeProto], outer: list[onnx.NodeProto], fixed: set[str]
    ) -> list[onnx.NodeProto]:
        """The nodes that stay; arithmetic goes to `outer`, the first time. `fixed` names are kept."""
        kept = []
        for node in nodes:
            node.input[:] = [renamed.get(n, n) for n in node.input]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    inner = attribute.g
                    rest = keep(list(inner.node), outer, {o.name for o in inner.output})
                    del inner.node[:]
                    inner.node.extend(rest)
            key = None if fixed & set(node.output) else key_of(node)
            if key is None:
                (outer if nodes is top else kept).append(node)
                continue
            if key not in made:
                made[key] = list(node.output)
                outer.append(node)
            numbers.update(made[key])
            renamed.update(zip(node.output, made[key], strict=True))
        return kept

    top, outer = list(graph.node), []
    keep(top, outer, {o.name for o in graph.output})
    del graph.node[:]
    graph.node.extend(outer)


def _fixed(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else None


def _nodes_of(node: onnx.NodeProto, graphs: list[onnx.GraphProto], name: str) -> list[onnx.NodeProto]:
    """What an op stands for."""
    if len(graphs) == 1:
        nodes, made = _instance(graphs[0], list(node.input), name)
        return nodes + [
            helper.make_node("Identity", [a.name], [b], name=f"{name}/{b}")
            for a, b in zip(made, node.output, strict=True)
        ]
    branches = []
    for side, graph in zip(("then", "else"), graphs, strict=True):
        nodes, made = _instance(graph, list(node.input)[1:], f"{name}/{side}")
        branches.append(helper.make_graph(nodes, f"{name}/{side}", [], made))
    then, other = branches
    output = list(node.output)
    return [helper.make_node("If", [node.input[0]], output, name=name, then_branch=then, else_branch=other)]


class _Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function, form: Any):
        super().__init__()
        self.function, self.form = function, form

    def forward(self, tensors: State) -> Tensor | tuple[Tensor, ...]:
        return self.function(self.form, tensors)


def _export(
    function: Function, form: Any, tensors: State, opset: int, single: torch.SymInt | None
) -> onnx.GraphProto:
    def example(size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        return 1 if str(size) == str(single) else size.node.hint

    def varies(size: int | torch.SymInt) -> bool:
        return not isinstance(size, int) and str(size) != str(single)

    given = {n: torch.zeros([example(d) for d in t.shape], dtype=t.dtype) for n, t in tensors.items()}
    varying = {
        n: {i: torch.export.Dim.DYNAMIC for i, d in enumerate(t.shape) if varies(d)}
        for n, t in tensors.items()
    }
    program = torch.onnx.export(
        _Module(function, form).eval(),
        (),
        kwargs={"tensors": given},
        dynamic_shapes={"tensors": varying},
        input_names=list(tensors),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    graph = program.model_proto.graph
    _infer_sizes(graph)
    return graph


def _infer_sizes(graph: onnx.GraphProto) -> None:
    """Let a reshape with one unknown size infer it, instead of computing it from other shapes."""
    makers = {output: node for node in graph.node for output in node.output}
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for name, node in makers.items():
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[name] = numpy_helper.to_array(node.attribute[0].t)
    made = {}
    for node in graph.node:
        joined = makers.get(node.input[1]) if node.op_type == "Reshape" else None
        if joined is None or joined.op_type != "Concat":
            continue
        known = [constants.get(name) for name in joined.input]
        if sum(k is None for k in known) == 1 and all(k is None or k.min() > 0 for k in known):
            sizes = np.concatenate([np.array([-1]) if k is None else k for k in known]).astype(np.int64)
            name = f"{joined.output[0]}_inferred"
            made[name] = numpy_helper.from_array(sizes, name)
            node.input[1] = name
    graph.initializer.extend(made.values())
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for node in reversed(list(graph.node)):
        if not read & set(node.output):
            graph.node.remove(node)
            read = {name for n in graph.node for name in n.input} | {o.name for o in graph.output}


def _instance(
    graph: onnx.GraphProto, operands: list[str], prefix: str
) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """A copy of the graph's nodes that reads `operands`, and its outputs."""
    own = {i.name: operand for i, operand in zip(graph.input, operands, strict=True)}

    def renamed(name: str) -> str:
        return name and own.get(name, f"{prefix}/{name}")

    nodes = []
    for tensor in graph.initializer:
        value = onnx.TensorProto()
        value.CopyFrom(tensor)
        nodes.append(helper.make_node("Constant", [], [renamed(tensor.name)], value=value))
    for node in graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{prefix}/{node.name}"
        copied.input[:] = [renamed(n) for n in node.input]
        copied.output[:] = [renamed(n) for n in node.output]
        nodes.append(copied)
    return nodes, [helper.make_value_info(renamed(o.name), o.type) for o in graph.output]
