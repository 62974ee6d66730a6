"""keep_window: without a cache, each query reads the exact form of the last `window` tokens.

    before:  key_attended, value_attended -> attention(query, ., ., mask)

    after:   cat(key_attended, exact), cat(value_attended, exact) -> attention(query, ., ., cat of two masks)

Every token comes twice, through the codes and exact, and the mask lets query i see token j exact where
j > i - window, through the codes elsewhere. Codes are made from the 16-bit form of a token, as the packed
cache makes them.
"""

from __future__ import annotations

import torch
from torch import fx

from rotatekv_fx.passes.base import Rewrite, dtype_of
from rotatekv_fx.sites import replay

aten = torch.ops.aten


def keep_window(rewrite: Rewrite) -> dict[str, int]:
    """Let the attention read two forms of each token.

    Returns:
        The window (0 where the plan keeps none).
    """
    window, site, graph = rewrite.plan.window, rewrite.site, rewrite.graph
    if not window:
        return {"window": 0}
    key, value = (_rounded(rewrite, node) for node in (rewrite.exact_key, rewrite.value))
    with graph.inserting_before(site.attention):
        region = _between(graph, rewrite.key_read, rewrite.key_attended)
        exact_key = replay(graph, region, {rewrite.key_read: key})[rewrite.key_attended] if region else key
        keys = graph.call_function(aten.cat.default, ([rewrite.key_attended, exact_key], 2))
        values = graph.call_function(aten.cat.default, ([rewrite.value_attended, value], 2))
        mask = _two_forms(rewrite, window)
    query, _, _, _, extra = site.attention.args
    site.attention.args = (query, keys, values, mask, extra)
    return {"window": window}


def _rounded(rewrite: Rewrite, node: fx.Node) -> fx.Node:
    """The exact form of what `node` holds; everything that reads `node` then reads that."""
    before = set(node.users)
    with rewrite.graph.inserting_after(node):
        anchor = rewrite.graph.call_function(aten.alias.default, (node,))
    with rewrite.graph.inserting_before(anchor):
        exact = rewrite.as_exact(node)
    rewrite.graph.erase_node(anchor)
    if exact is not node:
        node.replace_all_uses_with(exact, delete_user_cb=lambda user: user in before)
    return exact


def _between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes that make `last` of `first`, in order; none where they are the same."""
    after, needed = {first}, set()
    for node in graph.nodes:
        if any(i in after for i in node.all_input_nodes):
            after.add(node)
    pending = [last]
    while pending:
        node = pending.pop()
        if node in after and node is not first and node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return [n for n in graph.nodes if n in needed]


def _two_forms(rewrite: Rewrite, window: int) -> fx.Node:
    """[B or 1, 1, S, 2S]: tokens through the codes outside the window, exact inside it."""
    graph, site, mask = rewrite.graph, rewrite.site, rewrite.mask
    call = graph.call_function
    count = call(aten.sym_size.int, (site.hidden, 1))
    column = call(aten.arange.default, (count,), {"device": site.device})
    row = call(aten.unsqueeze.default, (column, 1))
    outside = call(aten.le.Tensor, (column, call(aten.sub.Tensor, (row, window))))
    inside = call(aten.logical_not.default, (outside,))
    if mask is not None and dtype_of(mask) is not torch.bool:
        hidden = torch.finfo(dtype_of(mask)).min
        halves = [call(aten.masked_fill.Scalar, (mask, here, hidden)) for here in (inside, outside)]
        return call(aten.cat.default, (halves, -1))
    if mask is None:
        causal = call(aten.le.Tensor, (column, row))
        if not site.capture.arguments.static.get("is_causal", True):
            causal = call(aten.ones_like.default, (causal,))
        mask = call(aten.unsqueeze.default, (call(aten.unsqueeze.default, (causal, 0)), 0))
    halves = [call(aten.logical_and.default, (mask, here)) for here in (outside, inside)]
    return call(aten.cat.default, (halves, -1))
