"""Attention over a packed layer: on unpacked keys and values for many queries, on their codes for one."""

from __future__ import annotations

import dataclasses

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
    """Attention [B, S, Hq, Dv] on unpacked keys and values; `t` as `Read.tensors`."""
    return attend_to(form, t, unpacked_keys(form.key, t))


def attend_to(form: Form, t: State, keys: Tensor) -> Tensor:
    """Attention on keys [B, Hkv, C + X, D] and unpacked values."""
    visible, values = torch.cat([t["seen_codes"], t["seen_exact"]], -1), unpacked_values(form.value, t)
    query, logits = t["query"], t.get("sink_logits")
    return attention.attend(query, keys, values, visible, form.scale, form.softcap, logits, False)


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
        coded = coded + rows @ t["features"][:, None].transpose(-1, -2)
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
    """[B, Hq, S, C] weights of coded values -> [B, Hq, S, Dv]."""
    batch, query_heads, tokens, columns = weights.shape
    q, heads = codec.quantizer, codec.heads
    repeats, (codes, scale, _) = query_heads // heads, parts
    if dim % q.group:  # a group reaches over heads: every head sums all channels, and keeps its own
        rows = weights.reshape(batch, 1, query_heads * tokens, columns)
    else:
        rows = weights.reshape(batch, heads, repeats * tokens, columns)
        rows = rows.repeat_interleave(dim // q.group, 1)
    summed = value_products(rows * scale.float()[:, :, None], codes, q.bits, q.group)
    summed = summed + rows @ base_of(codec, parts)[..., None]
    if dim % q.group:
        every = summed.transpose(1, 2).reshape(batch, heads, repeats * tokens, heads, dim)
        own = torch.eye(heads, device=every.device)[:, None, :, None]
        return (every * own).sum(3).reshape(batch, query_heads, tokens, dim)
    by_head = summed.reshape(batch, heads, dim // q.group, repeats * tokens, q.group).transpose(2, 3)
    return by_head.reshape(batch, query_heads, tokens, dim)


def _per_kv_head(x: Tensor, other: Tensor) -> Tensor:
    """Matrix products of [B, Hq, S, K] with the [B or 1, Hkv, K, M] of each query head's KV head."""
    batch, query_heads, tokens, inner = x.shape
    heads = other.shape[-3]
    rows = x.reshape(batch, heads, query_heads // heads * tokens, inner)
    return (rows @ other).reshape(batch, query_heads, tokens, other.shape[-1])
