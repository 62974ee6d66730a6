"""insert_rotation: keys and values are rotated before they are stored, and rotated back when they are read.

    before:  k_proj -> key_pre -> rope -> kv_update -> attention -> o_proj
             v_proj -> value -----------> kv_update ----^

    after, keys stored before RoPE:
             k_proj' -> key ~> key_read -> rotate^-1 -> rope -> attention -> o_proj'
             v_proj' -> value ~> value_read --------------------^

    after, keys stored after RoPE, less the calibrated mean:
             k_proj -> key_pre -> rope -> sub(rope(mean)) -> rotate -> key ~> rotate^-1 -> add(rope(mean)) ->
             key_read

`~>` is where the quantizer goes. A prime marks a projection that the rotation was merged into (float64,
rounded once); where more than layout operations stand between projection and tensor, a `rotate` node takes
its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rotatekv_fx.capture import RUNTIME_NAME
from rotatekv_fx.passes.base import Rewrite
from rotatekv_fx.recipes.base import ChannelTransform
from rotatekv_fx.sites import Projection, replay, rope_region

aten = torch.ops.aten
ops = torch.ops.rotatekv


def insert_rotation(rewrite: Rewrite) -> dict[str, int]:
    """Rotate keys (before RoPE where the plan says so) and values, merged into projections where possible.

    Returns:
        Counts of merged projections and of online `rotate` nodes.
    """
    counts = {"merged": 0, "online": 0}
    graph, site = rewrite.graph, rewrite.site
    anchor = site.attention if site.attention is not None else site.cache_write
    with graph.inserting_before(anchor):
        _rotate_keys(rewrite, counts)
        _rotate_values(rewrite, counts)
    if rewrite.plan.value is not None:
        _unrotate_attention(rewrite, counts)
    _attend_to(rewrite)
    return counts


def _rotate_keys(rewrite: Rewrite, counts: dict[str, int]) -> None:
    graph, site, plan = rewrite.graph, rewrite.site, rewrite.plan
    if not plan.before_rope:
        rewrite.exact_key = site.key_post
        mean = _mean_at_positions(rewrite)
        key = site.key_post if mean is None else graph.call_function(aten.sub.Tensor, (site.key_post, mean))
        rewrite.key = key = _transformed(rewrite, key, plan.key, None, "key", counts)
        rewrite.key_coded = graph.call_function(aten.alias.default, (key,))
        read = _inverse(rewrite, rewrite.key_coded, plan.key, "key")
        read = read if mean is None else graph.call_function(aten.add.Tensor, (read, mean))
        rewrite.key_read = rewrite.key_attended = graph.call_function(aten.alias.default, (read,))
        return
    key = (
        graph.call_function(aten.transpose.int, (site.key_pre, 1, 2))
        if site.key_pre_transposed
        else site.key_pre
    )
    key = _transformed(rewrite, key, plan.key, site.key_projection, "key", counts)
    rewrite.exact_key = rewrite.key = key
    rewrite.key_coded = graph.call_function(aten.alias.default, (key,))
    rewrite.key_read = read = graph.call_function(aten.alias.default, (rewrite.key_coded,))
    read = _inverse(rewrite, read, plan.key, "key")
    if site.key_pre_transposed:
        read = graph.call_function(aten.transpose.int, (read, 1, 2))
    positions = {n.name: n for n in graph.find_nodes(op="placeholder")}
    env: dict[fx.Node, fx.Node] = {site.key_pre: read}
    for source in site.positional:
        rewrite.positions_read[source.name] = graph.call_function(
            aten.alias.default, (positions[source.name],)
        )
        env[positions[source.name]] = rewrite.positions_read[source.name]
    rewrite.key_attended = replay(graph, rope_region(site), env)[site.key_post]


def _mean_at_positions(rewrite: Rewrite) -> fx.Node | None:
    """RoPE of the calibrated mean at the new tokens' positions, or None where the plan removes none."""
    graph, site = rewrite.graph, rewrite.site
    if rewrite.plan.center is None:
        return None
    center, dtype = rewrite.plan.center, site.key_pre.meta["val"].dtype
    mean = _buffer(rewrite, "key_center", center)
    if not site.key_pre_transposed:
        mean = graph.call_function(aten.unsqueeze.default, (mean, 1))
    zeros = graph.call_function(aten.zeros_like.default, (site.key_pre,))
    mean = graph.call_function(aten.add.Tensor, (zeros, graph.call_function(aten.to.dtype, (mean, dtype))))
    return replay(graph, rope_region(site), {site.key_pre: mean})[site.key_post]


def _rotate_values(rewrite: Rewrite, counts: dict[str, int]) -> None:
    graph, site = rewrite.graph, rewrite.site
    rewrite.value = _transformed(
        rewrite, site.value, rewrite.plan.value, site.value_projection, "value", counts
    )
    rewrite.value_coded = graph.call_function(aten.alias.default, (rewrite.value,))
    rewrite.value_read = rewrite.value_attended = graph.call_function(
        aten.alias.default, (rewrite.value_coded,)
    )
    if site.attention is None:
        rewrite.value_attended = _inverse(rewrite, rewrite.value_read, rewrite.plan.value, "value")


def _attend_to(rewrite: Rewrite) -> None:
    """Let the attention read what the rewrite reads, and drop the captured cache write."""
    write = rewrite.site.cache_write
    replacement = {0: rewrite.key_attended, 1: rewrite.value_attended}
    for user in list(write.users):
        user.replace_all_uses_with(replacement[user.args[1]])
        rewrite.graph.erase_node(user)
    rewrite.graph.erase_node(write)


def _unrotate_attention(rewrite: Rewrite, counts: dict[str, int]) -> None:
    """Undo the values' rotation in o_proj, or on the attention's output [B, S, Hq, Dv]."""
    graph, site, transform = rewrite.graph, rewrite.site, rewrite.plan.value
    if site.attention is None:
        return
    repeats = site.query_heads // site.kv_heads
    inverse = transform.inverse
    if inverse.shape[0] > 1:
        inverse = inverse.repeat_interleave(repeats, 0)
    if site.output_projection is not None:
        _fold_output(rewrite, site.output_projection, inverse)
        counts["merged"] += 1
        return
    users = list(site.attention.users)
    with graph.inserting_after(site.attention):
        heads_first = graph.call_function(aten.transpose.int, (site.attention, 1, 2))
    with graph.inserting_after(heads_first):
        matrix = _buffer(rewrite, "value_inverse", inverse)
    with graph.inserting_after(matrix):
        rotated = graph.call_function(ops.rotate.default, (heads_first, matrix, None, True))
    with graph.inserting_after(rotated):
        back = graph.call_function(aten.transpose.int, (rotated, 1, 2))
    for user in users:
        user.replace_input_with(site.attention, back)
    counts["online"] += 1


def _transformed(
    rewrite: Rewrite,
    node: fx.Node,
    transform: ChannelTransform | None,
    projection: Projection | None,
    name: str,
    counts: dict[str, int],
) -> fx.Node:
    if transform is None:
        return node
    if projection is not None:
        _fold_input(rewrite, projection, transform)
        counts["merged"] += 1
        return node
    counts["online"] += 1
    matrix = _buffer(rewrite, f"{name}_matrix", transform.matrix)
    return rewrite.graph.call_function(
        ops.rotate.default, (node, matrix, _order(rewrite, transform, name), False)
    )


def _inverse(rewrite: Rewrite, node: fx.Node, transform: ChannelTransform | None, name: str) -> fx.Node:
    if transform is None:
        return node
    matrix = _buffer(rewrite, f"{name}_inverse", transform.inverse)
    return rewrite.graph.call_function(
        ops.rotate.default, (node, matrix, _order(rewrite, transform, name), True)
    )


def _order(rewrite: Rewrite, transform: ChannelTransform, name: str) -> fx.Node | None:
    return None if transform.order is None else _buffer(rewrite, f"{name}_order", transform.order)


def _buffer(rewrite: Rewrite, name: str, tensor: Tensor) -> fx.Node:
    rewrite.buffers[name] = tensor.float() if tensor.is_floating_point() else tensor
    return rewrite.graph.get_attr(f"{RUNTIME_NAME}.{name}")


def _parameter(rewrite: Rewrite, name: str) -> Tensor:
    """The parameter in float64, with what earlier folds made of it."""
    if name not in rewrite.folded:
        parameter = rewrite.site.capture.module.get_parameter(name).detach()
        rewrite.folded[name] = parameter.to("cpu", torch.float64, copy=True)
    return rewrite.folded[name]


def _fold_input(rewrite: Rewrite, projection: Projection, transform: ChannelTransform) -> None:
    """y = T(W x + b) with rows of W in [H, D] order: W' = T(W), b' = T(b)."""
    rows = projection.features.flatten()
    weight = _parameter(rewrite, projection.weight)
    weight[rows] = transform.apply(weight[rows].mT).mT
    if projection.bias is not None:
        bias = _parameter(rewrite, projection.bias)
        bias[rows] = transform.apply(bias[rows])


def _fold_output(rewrite: Rewrite, projection: Projection, inverse: Tensor) -> None:
    """W a with a = a' @ inverse per query head: each head's columns of W become columns @ inverse^T."""
    weight = _parameter(rewrite, projection.weight)
    per_head = weight[:, projection.features]  # [out, Hq, Dv]
    weight[:, projection.features] = torch.einsum(
        "ohd,hed->ohe", per_head, inverse.expand(per_head.shape[1], -1, -1)
    )
