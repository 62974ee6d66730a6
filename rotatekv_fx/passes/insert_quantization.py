"""insert_quantization: what the attention reads has been through the codes.

before:  key ~> key_coded                           (values alike)
after:   key -> quantize -> dequantize -> key_coded
         key -> compensate -> quantize -> ...       (recipes with error feedback)
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import Tensor, fx

from rotatekv_fx.capture import RUNTIME_NAME
from rotatekv_fx.passes.base import Rewrite, dtype_of
from rotatekv_fx.recipes.base import Quantizer

ops = torch.ops.rotatekv


def insert_quantization(rewrite: Rewrite) -> dict[str, int]:
    """Put quantize and dequantize nodes between what is stored and what is read.

    Returns:
        Count of quantize nodes (0 where the plan stores exact values).
    """
    plan, site = rewrite.plan, rewrite.site
    sides = (
        ("key", rewrite.key, rewrite.key_coded, plan.key_quantizer, plan.key_feedback),
        ("value", rewrite.value, rewrite.value_coded, plan.value_quantizer, plan.value_feedback),
    )
    quantized = 0
    for name, stored, coded, quantizer, feedback in sides:
        if quantizer is not None:
            source = stored
            if feedback is not None:
                source = _compensate(rewrite, stored, coded, quantizer, f"{name}_feedback", feedback)
            exact = _quantize(rewrite.graph, source, coded, quantizer, site.kv_heads, dtype_of(stored))
            coded.replace_input_with(stored, exact)
            quantized += 1
    return {"quantized": quantized}


def _compensate(
    rewrite: Rewrite, stored: fx.Node, coded: fx.Node, quantizer: Quantizer, name: str, feedback: Tensor
) -> fx.Node:
    rewrite.buffers[name] = feedback.float()
    q = quantizer
    with rewrite.graph.inserting_before(coded):
        held = rewrite.graph.get_attr(f"{RUNTIME_NAME}.{name}")
        return rewrite.graph.call_function(ops.compensate.default, (stored, held, q.bits, q.group, q.clip))


def _quantize(
    graph: fx.Graph, stored: fx.Node, coded: fx.Node, quantizer: Quantizer, heads: int, dtype: torch.dtype
) -> fx.Node:
    q = quantizer
    with graph.inserting_before(coded):
        packed = graph.call_function(ops.quantize.default, (stored, q.bits, q.group, q.clip, q.scheme))
        parts = [graph.call_function(getitem, (packed, i)) for i in range(3)]
        return graph.call_function(ops.dequantize.default, (*parts, q.bits, q.group, heads, dtype))
