"""Attention over a packed layer: on unpacked keys and values for many queries, on their codes for one."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from rotatekv_fx.cache.codec import Codec
from rotatekv_fx.cache.layers import LayerSpec
from rotatekv_fx.export.codes import regroup, value_products
from rotatekv_fx.export.fold import folded_scores
from rotatekv_fx.export.state import (
    SIDES,
    State,
    base_of,
    behind,
    coded_rows,
    decode,
    exact_columns,
    history,
    into_window,
    ordered,
    put_in,
    seen_columns,
    side_of,
)
from rotatekv_fx.kernels.attention import reference as attention


@dataclasses.dataclass(frozen=True)
class Form:
    """What of a layer's attention is fixed at export."""

    spec: LayerSpec
    scale: float
    softcap: float
    blocks: int


def many(form: Form, t: State) -> tuple[Tensor, ...]:
    """Put tokens in, and attend to unpacked keys and values.

    Args:
        t: as `state.put_in` and `state.seen_columns` take it; query [B, Hq, S, D]; and, where the layer has
            them, inverse (of the keys' rotation), features [B, 1, C, F] with spread [Hkv, F, D] (of the
            mean), and sink_logits [Hq].

    Returns:
        The layer's new tensors, as `state.ordered` has them, and the attention [B, S, Hq, Dv].
    """
    *new, seen, keys, values = unpacked(form.spec, t)
    query, logits = t["query"], t.get("sink_logits")
    if form.softcap == 0.0 and logits is None:
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
        found = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=form.scale
        ).transpose(1, 2)
    else:
        found = attention.attend(query, keys, values, seen, form.scale, form.softcap, logits, False)
    return *new, found.contiguous()


def unpacked(spec: LayerSpec, t: State) -> tuple[Tensor, ...]:
    """Put tokens in, and unpack all.

    Args:
        t: as in `many`, but for the query.

    Returns:
        The layer's new tensors; bool [B, 1, S, C + X], which columns each query sees; keys and values
        [B, Hkv, C + X, D].
    """
    new, read = put_in(spec, t)
    sides = []
    for side, codec in zip(SIDES, (spec.key, spec.value), strict=True):
        exact, x = read[f"exact_{side}s"], decode(codec, side_of(read, side))
        if side == "key" and "inverse" in t:
            x = regroup(x, t["inverse"].shape[-1]) @ t["inverse"]
        x = regroup(x, exact.shape[3])
        if side == "key" and "spread" in t:
            x = x + t["features"] @ t["spread"]
        sides.append(torch.cat([x, exact], 2))
    return *ordered(spec, new), seen_columns(spec, t), *sides


def single(form: Form, t: State) -> tuple[Tensor, ...]:
    """The same for one token, without unpacking codes.

    Args:
        t: as in `many`; and turn, as `fold.fold_inverse` has it; bias [B, 1, 1, C + X], to be added to the
            scores of the C coded and X exact columns; and with a window new rows of the history, under their
            names behind "leaving ".
    """
    spec, query = form.spec, t["query"] * form.scale
    new, exact = into_window(spec, t)
    if spec.window:
        rows = [t[f"leaving {name}"] for name in history(spec)]
    else:
        rows = coded_rows(spec, t, t["key"], t["value"])
    joined = behind(spec, t, rows)
    new |= joined[0]
    read = joined[1] | exact_columns(spec, t, [new[f"recent_{side}s"] for side in SIDES if exact])
    batch, heads = query.shape[:2]
    rows = query.reshape(batch, spec.key.heads, -1, query.shape[3])  # [B, Hkv, R, D]
    coded = folded_scores(spec.key, form.blocks, rows, side_of(read, "key"), t["turn"])
    coded = coded.reshape(batch, 1, heads, -1)
    if "spread" in t:
        of_mean = (rows @ t["spread"].transpose(1, 2)).reshape(batch, 1, heads, -1)
        coded = coded + of_mean @ t["features"].transpose(2, 3)
    keys, values = read["exact_keys"], read["exact_values"]
    scores = torch.cat([coded, (rows @ keys.transpose(2, 3)).reshape(batch, 1, heads, -1)], 3)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    sizes = [coded.shape[3], keys.shape[2]]
    scores = scores + t["bias"]
    if "sink_logits" in t:
        scores = torch.cat(
            [scores, t["sink_logits"].float()[None, None, :, None].expand(batch, -1, -1, -1)], 3
        )
        sizes.append(1)
    of_codes, of_exact, *_ = torch.softmax(scores, -1).split(sizes, 3)
    near = of_exact.reshape(batch, spec.value.heads, -1, sizes[1]) @ values
    dim = values.shape[3]
    far = _sum_codes(spec.value, of_codes, side_of(read, "value"), dim)
    return *ordered(spec, new), far + near.reshape(batch, 1, heads, dim)


def _sum_codes(codec: Codec, weights: Tensor, parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """[B, 1, Hq, C] weights of coded values -> [B, 1, Hq, Dv].

    Heads go together in the smallest spans of whole groups; a head keeps its own channels of its span.
    """
    batch, _, query_heads, columns = weights.shape
    q, (codes, scale, _) = codec.quantizer, parts
    span = math.lcm(dim, q.group)
    spans, together, groups = codec.heads * dim // span, span // dim, span // q.group
    weights = weights.reshape(batch, spans, query_heads // spans, columns)
    if groups > 1:
        weights = weights.repeat_interleave(groups, 1)
    summed = value_products(weights * scale.float()[:, :, None], codes, q.bits, q.group)
    summed = summed + weights @ base_of(codec, parts)[..., None]
    if groups > 1:
        summed = regroup(summed, span)
    if together > 1:
        own = torch.eye(together, device=summed.device)[:, None, :, None]
        summed = (summed.reshape(batch, spans, together, -1, together, dim) * own).sum(4)
    return summed.reshape(batch, 1, query_heads, dim)
