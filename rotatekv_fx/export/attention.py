"""Attention over a packed layer: on unpacked keys and values for many queries, on their codes for one."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from rotatekv_fx.cache.codec import Codec
from rotatekv_fx.export.codes import value_products
from rotatekv_fx.export.fold import folded_scores
from rotatekv_fx.export.state import State, base_of, decode, mean_at, side_of
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.kernels.hadamard import reference as hadamard


@dataclasses.dataclass(frozen=True)
class Form:
    """What of a layer's attention is fixed at export."""

    key: Codec
    value: Codec
    scale: float
    softcap: float
    blocks: int


def unpacked(form: Form, t: State) -> Tensor:
    """Attention [B, S, Hq, Dv] on unpacked keys and values.

    Args:
        t: query [B, Hq, S, D]; the parts of keys and values in the C coded columns, tokens at axis 2;
            exact_keys and exact_values [B, Hkv, X, D]; seen_codes and seen_exact, bool [B, 1, S, C] and
            [B, 1, S, X], which columns each query sees; and, where the layer has them, inverse (of the keys'
            rotation), features [B, F, C] and spread [Hkv, F, D] (of the mean), and sink_logits [Hq].
    """
    keys, values = unpacked_keys(form.key, t), unpacked_values(form.value, t)
    logits = t.get("sink_logits")
    return attention.attend(
        t["query"], keys, values, visible_columns(t), form.scale, form.softcap, logits, False
    )


def visible_columns(t: State) -> Tensor:
    """bool [B, 1, S, C + X]."""
    return torch.cat([t["seen_codes"], t["seen_exact"]], -1)


def unpacked_keys(codec: Codec, t: State) -> Tensor:
    """[B, Hkv, C + X, D], from keys as stored and exact ones."""
    keys = decode(codec, side_of(t, "key"))
    if "inverse" in t:
        keys = hadamard.rotate(keys, t["inverse"], None, True)
    if "spread" in t:
        keys = keys + mean_at(t["features"], t["spread"])
    return torch.cat([keys, t["exact_keys"]], 2)


def unpacked_values(codec: Codec, t: State) -> Tensor:
    """[B, Hkv, C + X, Dv]."""
    return torch.cat([decode(codec, side_of(t, "value")), t["exact_values"]], 2)


def folded(form: Form, t: State) -> Tensor:
    """The same attention on codes, without unpacking them."""
    query = t["query"] * form.scale
    coded = folded_scores(form.key, form.blocks, query, side_of(t, "key"), t["turn"])
    if "spread" in t:
        rows = _per_kv_head(query, t["spread"].transpose(-1, -2))
        coded = coded + rows @ t["features"][:, None]
    scores = [coded, _per_kv_head(query, t["exact_keys"].transpose(-1, -2))]
    if form.softcap:
        scores = [form.softcap * torch.tanh(s / form.softcap) for s in scores]
    lowest = torch.finfo(query.dtype).min
    seen = t["seen_codes"], t["seen_exact"]
    scores = [s.masked_fill(~mask, lowest) for s, mask in zip(scores, seen, strict=True)]
    top = torch.maximum(*(s.amax(-1, keepdim=True) for s in scores))
    weights = [torch.exp(s - top) for s in scores]
    total = sum(w.sum(-1, keepdim=True) for w in weights)
    if "sink_logits" in t:
        total = total + torch.exp(t["sink_logits"].to(top.dtype)[None, :, None, None] - top)
    summed = _sum_codes(form.value, weights[0], side_of(t, "value"), t["exact_values"].shape[-1])
    summed = summed + _per_kv_head(weights[1], t["exact_values"])
    return (summed / total).transpose(1, 2).contiguous()


def _sum_codes(codec: Codec, weights: Tensor, parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """[B, Hq, S, C] weights of coded values -> [B, Hq, S, Dv].

    Heads go together in the smallest spans of whole groups; a head keeps its own channels of its span.
    """
    batch, query_heads, tokens, columns = weights.shape
    q, (codes, scale, _) = codec.quantizer, parts
    span = math.lcm(dim, q.group)
    spans, together, groups = codec.heads * dim // span, span // dim, span // q.group
    rows = query_heads // codec.heads * tokens
    weights = weights.reshape(batch, spans, together * rows, columns)
    if groups > 1:
        weights = weights.repeat_interleave(groups, 1)
    summed = value_products(weights * scale.float()[:, :, None], codes, q.bits, q.group)
    summed = summed + weights @ base_of(codec, parts)[..., None]
    if groups > 1:
        summed = summed.reshape(batch, spans, groups, together * rows, q.group).transpose(2, 3)
    if together > 1:
        own = torch.eye(together, device=summed.device)[:, None, :, None]
        summed = (summed.reshape(batch, spans, together, rows, together, dim) * own).sum(4)
    return summed.reshape(batch, query_heads, tokens, dim)


def _per_kv_head(x: Tensor, other: Tensor) -> Tensor:
    """Matrix products of [B, Hq, S, K] with the [B or 1, Hkv, K, M] of each query head's KV head."""
    batch, query_heads, tokens, inner = x.shape
    heads = other.shape[-3]
    rows = x.reshape(batch, heads, query_heads // heads * tokens, inner)
    return (rows @ other).reshape(batch, query_heads, tokens, other.shape[-1])
