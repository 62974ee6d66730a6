"""lower_attention: the stored form goes to the packed cache, and the attention reads what the cache holds.

    before:  exact_key -> quantize -> dequantize -> restore_sinks -> key_read -> ... -> attention(.., mask)
             value --------------------- alike -----------------> value_read --------------^

    after:   runtime.update(cache, exact_key, value, positions, residual, mask)
                 -> key_read -> ... -> attend(query, ., ., mask_read)
                 -> value_read -------------------^
                 -> positions_read, mask_read

`runtime.update` appends the new tokens to the layer's packed cache, with the same transforms and ops on the
way in and out, and returns every token that the attention sees. A module that computes its attention inline
keeps doing so.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from rotatekv_fx.passes.base import Rewrite
from rotatekv_fx.sites import HELD

ops = torch.ops.rotatekv


def lower_attention(rewrite: Rewrite) -> dict[str, int]:
    """Replace the functional store by the packed cache, and the attention marker by `attend`.

    Returns:
        Count of attentions lowered to `attend`, and of those left inline.
    """
    graph, site = rewrite.graph, rewrite.site
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_before(placeholders[0]):
        runtime = graph.placeholder("runtime")
        cache = graph.placeholder("cache")
    for node in graph.find_nodes(op="call_function", target=HELD):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_method("held", (runtime, cache, *node.args)))
        graph.erase_node(node)
    inputs = {n.name: n for n in placeholders}
    positions = tuple(inputs[name] for name in rewrite.position_inputs)
    reads = [rewrite.key_read, rewrite.value_read, *rewrite.positions_read.values()]
    order = {node: i for i, node in enumerate(graph.nodes)}
    first_read = min(reads, key=order.__getitem__)
    # the new tokens' values may be computed after the first read of the keys
    _move_before(graph, [rewrite.exact_key, rewrite.value], first_read)
    with graph.inserting_before(first_read):
        arguments = (
            runtime,
            cache,
            rewrite.exact_key,
            rewrite.value,
            positions,
            rewrite.residual,
            rewrite.mask,
        )
        update = graph.call_method("update", arguments)
        mask_read, *results = [graph.call_function(getitem, (update, i)) for i in range(len(reads) + 1)]
    for read, result in zip(reads, results, strict=True):
        read.replace_all_uses_with(result)
        graph.erase_node(read)
    if site.attention is None:
        _read_mask_inline(rewrite, update, mask_read)
        return {"attend": 0, "inline": 1}
    _attend(rewrite, mask_read)
    return {"attend": 1, "inline": 0}


def lower_without_cache(rewrite: Rewrite) -> dict[str, int]:
    """Replace the attention marker alone: a forward without a cache attends to what the graph itself reads.

    Returns:
        Count of attentions lowered to `attend`, and of those left inline.
    """
    if rewrite.site.attention is None:
        return {"attend": 0, "inline": 1}
    _attend(rewrite, rewrite.site.attention.args[3])
    return {"attend": 1, "inline": 0}


def _attend(rewrite: Rewrite, mask: fx.Node | None) -> None:
    graph, marker = rewrite.graph, rewrite.site.attention
    with graph.inserting_before(marker):
        attend = graph.call_function(ops.attend.default, _attend_arguments(rewrite, mask))
    marker.replace_all_uses_with(attend)
    graph.erase_node(marker)


def _read_mask_inline(rewrite: Rewrite, update: fx.Node, mask_read: fx.Node) -> None:
    """Inline attention that reads the mask after the update reads the mask of the update's columns."""
    seen = False
    for node in rewrite.graph.nodes:
        seen = seen or node is mask_read
        if seen and rewrite.mask in node.all_input_nodes:
            node.replace_input_with(rewrite.mask, mask_read)


def _attend_arguments(rewrite: Rewrite, mask: fx.Node | None) -> tuple[object, ...]:
    site = rewrite.site
    query, key, value, _, extra = site.attention.args
    arguments = site.capture.arguments
    static, named = arguments.static, dict(zip(arguments.extra_names, extra, strict=True))
    scale = static.get("scaling")
    causal = static.get("is_causal")
    return (
        query,
        key,
        value,
        mask,
        site.head_dim**-0.5 if scale is None else float(scale),
        float(static.get("softcap") or 0.0),
        named.get("s_aux"),
        getattr(site.capture.module, "is_causal", True) if causal is None else bool(causal),
    )


def _move_before(graph: fx.Graph, nodes: list[fx.Node], anchor: fx.Node) -> None:
    """Move what `nodes` are computed from, and they themselves, before `anchor`."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    needed: set[fx.Node] = set()
    pending = [n for n in nodes if order[n] > order[anchor]]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += [n for n in node.all_input_nodes if order[n] > order[anchor]]
    for node in sorted(needed, key=order.__getitem__):
        anchor.prepend(node)
