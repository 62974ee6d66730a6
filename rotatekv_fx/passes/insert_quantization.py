"""insert_quantization: what the attention reads has been through the codes.

before:  key ~> key_coded                           (values alike)
after:   key -> quantize -> dequantize -> key_coded
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

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
        (rewrite.key, rewrite.key_coded, plan.key_quantizer),
        (rewrite.value, rewrite.value_coded, plan.value_quantizer),
    )
    quantized = 0
    for stored, coded, quantizer in sides:
        if quantizer is not None:
            _quantize(rewrite.graph, stored, coded, quantizer, site.kv_heads)
            quantized += 1
    return {"quantized": quantized}


def _quantize(graph: fx.Graph, stored: fx.Node, coded: fx.Node, quantizer: Quantizer, heads: int) -> None:
    q = quantizer
    with graph.inserting_before(coded):
        packed = graph.call_function(ops.quantize.default, (stored, q.bits, q.group, q.clip, q.scheme))
        parts = [graph.call_function(getitem, (packed, i)) for i in range(3)]
        arguments = (*parts, q.bits, q.group, heads, dtype_of(stored))
        exact = graph.call_function(ops.dequantize.default, arguments)
    coded.replace_input_with(stored, exact)
