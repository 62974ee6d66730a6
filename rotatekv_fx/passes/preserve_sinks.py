"""preserve_sinks: tokens named by massive activations of the block's input are read exactly.

    before:  key -> quantize -> dequantize -> ... -> key_read

    after:   residual -> select_sinks -> tokens
             key -> quantize -> dequantize -> ... -> restore_sinks(., take_tokens(exact_key, tokens), tokens)
             -> key_read

Values alike, with the same tokens. Padding, which its own query does not see, is never chosen.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from rotatekv_fx.masks import hidden_below
from rotatekv_fx.passes.base import Rewrite

aten = torch.ops.aten
ops = torch.ops.rotatekv


def preserve_sinks(rewrite: Rewrite) -> dict[str, int]:
    """Choose sinks from the residual stream and restore their exact keys and values.

    Returns:
        Count of restored tensors (0 where the plan keeps no sinks).
    """
    if not rewrite.plan.sinks:
        return {"restored": 0}
    graph = rewrite.graph
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholders[-1]):
        rewrite.residual = graph.placeholder("residual")
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_before(min(rewrite.key_read, rewrite.value_read, key=order.__getitem__)):
        valid = _valid_tokens(graph, rewrite.mask)
        chosen = graph.call_function(ops.select_sinks.default, (rewrite.residual, valid, rewrite.plan.sinks))
        tokens = graph.call_function(getitem, (chosen, 1))
    for stored, read in ((rewrite.exact_key, rewrite.key_read), (rewrite.value, rewrite.value_read)):
        with graph.inserting_before(read):
            coded = read.args[0]
            exact = rewrite.as_exact(graph.call_function(ops.take_tokens.default, (stored, tokens)))
            restored = graph.call_function(ops.restore_sinks.default, (coded, exact, tokens))
        read.replace_input_with(coded, restored)
    return {"restored": 2}


def _valid_tokens(graph: fx.Graph, mask: fx.Node | None) -> fx.Node | None:
    """[B, S] of whether each token sees itself, from a mask [B, 1, S, S]."""
    if mask is None:
        return None
    heads = graph.call_function(aten.select.int, (mask, 1, 0))
    itself = graph.call_function(aten.diagonal.default, (heads, 0, 1, 2))
    dtype = mask.meta["val"].dtype
    if dtype is torch.bool:
        return itself
    return graph.call_function(aten.gt.Scalar, (itself, hidden_below(dtype)))
