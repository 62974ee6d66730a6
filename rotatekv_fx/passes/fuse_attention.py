"""fuse_attention: storing new tokens and attending to the cache become one call.

    before:  runtime.update(cache, key, value, positions, residual, mask) -> mask_read, key_read, value_read
             attend(query, key_read, value_read, mask_read, scale, softcap, sink_logits, causal)

    after:   runtime.attend(cache, query, key, value, positions, residual, mask, scale, ...)

What is read goes to the attention as it is where the recipe stores keys after RoPE and both inverse
transforms are merged or applied inside. Where it stores them before RoPE, the inverse rotation and RoPE stand
between update and attention, and go into the call too if the runtime can do them. Elsewhere nothing changes.
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
    between = _made_of(update, attend)
    turned = rewrite.turns_on_read and key is rewrite.key_attended
    if not (_is_result(mask, update, 0) and _is_result(value, update, 2)):
        return {"fused": 0}
    if not (turned or (_is_result(key, update, 1) and set(between) == {mask, key, value})):
        return {"fused": 0}
    if any(set(n.users) - {attend, *between} for n in between) or {query, *options} & set(between):
        return {"fused": 0}
    runtime, cache, *stored = update.args
    with graph.inserting_before(attend):
        fused = graph.call_method("attend", (runtime, cache, query, *stored, *options))
    attend.replace_all_uses_with(fused)
    for node in (attend, *reversed(between), update):
        graph.erase_node(node)
    return {"fused": 1}


def _made_of(update: fx.Node, attend: fx.Node) -> list[fx.Node]:
    """What depends on an update and not on the attention, in order."""
    made = {update: None}
    for node in update.graph.nodes:
        if node is not attend and any(source in made for source in node.all_input_nodes):
            made[node] = None
    return [node for node in made if node is not update and node is not attend]


def _is_result(node: object, update: fx.Node, index: int) -> bool:
    return isinstance(node, fx.Node) and node.target is getitem and node.args == (update, index)
