"""fuse_attention: storing new tokens and attending to the cache become one call.

    before:  runtime.update(cache, key, value, positions, residual, mask) -> mask_read, key_read, value_read
             attend(query, key_read, value_read, mask_read, scale, softcap, sink_logits, causal)

    after:   runtime.attend(cache, query, key, value, positions, residual, mask, scale, ...)

What is read goes to the attention as it is only where the recipe stores keys after RoPE and both inverse
transforms are merged or applied inside; elsewhere nothing changes.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from rotatekv_fx.passes.base import Rewrite

ops = torch.ops.rotatekv


def fuse_attention(rewrite: Rewrite) -> dict[str, int]:
    """Replace an update whose results only `attend` uses.

    Returns:
        Count of fused attentions.
    """
    graph = rewrite.graph
    updates = graph.find_nodes(op="call_method", target="update")
    attends = graph.find_nodes(op="call_function", target=ops.attend.default)
    if len(updates) != 1 or len(attends) != 1:
        return {"fused": 0}
    (update,), (attend,) = updates, attends
    query, key, value, mask, *options = attend.args
    reads = (mask, key, value)
    if not all(_is_result(read, update, index) for index, read in enumerate(reads)):
        return {"fused": 0}
    if any(set(read.users) - {attend} for read in reads) or set(update.users) - set(reads):
        return {"fused": 0}
    runtime, cache, *stored = update.args
    with graph.inserting_before(attend):
        fused = graph.call_method("attend", (runtime, cache, query, *stored, *options))
    attend.replace_all_uses_with(fused)
    for node in (attend, *reads, update):
        graph.erase_node(node)
    return {"fused": 1}


def _is_result(node: object, update: fx.Node, index: int) -> bool:
    return isinstance(node, fx.Node) and node.target is getitem and node.args == (update, index)
