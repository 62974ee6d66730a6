"""Attention over the cache, and the choice and restoring of sink tokens, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    causal: bool,
) -> Tensor:
    """Reference of the op `rotatekv::attend` (`rotatekv_fx.ops` describes it)."""
    tokens, length = query.shape[2], key.shape[2]
    key, value = (_repeat_heads(x.to(query.dtype), query.shape[1]) for x in (key, value))
    if mask is not None:
        mask = mask[..., :length] if mask.dtype == torch.bool else mask[..., :length].to(query.dtype)
    elif causal and not (isinstance(tokens, int) and tokens == 1):
        last_seen = torch.arange(tokens, device=query.device) + (length - tokens)
        mask = torch.arange(length, device=query.device) <= last_seen[:, None]
    if softcap == 0.0 and sink_logits is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        out = _softmax_attention(query, key, value, mask, scale, softcap, sink_logits).to(query.dtype)
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > -torch.inf
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous()


def _repeat_heads(x: Tensor, query_heads: int) -> Tensor:
    """[B, Hkv, N, D] to [B, Hq, N, D], the copies of a head side by side."""
    batch, heads, length, dim = x.shape
    if heads == query_heads:
        return x
    copies = x[:, :, None].expand(batch, heads, query_heads // heads, length, dim)
    return copies.reshape(batch, query_heads, length, dim)


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if softcap != 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if sink_logits is not None:
        extra = sink_logits.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return weights @ value.float()


def select_sinks(residual: Tensor, valid: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Reference of the op `rotatekv::select_sinks` (`rotatekv_fx.ops` describes it)."""
    # The largest of the sequence are among the largest of each token, so only those are ranked together.
    per_token = min(count, residual.shape[-1])
    largest = residual.abs().topk(per_token, dim=-1).values.float()
    largest = largest.where(largest.isfinite(), -1.0)
    if valid is not None:
        largest = largest.masked_fill(~valid[..., None], -1.0)
    scores, index = F.pad(largest.flatten(1), (0, count), value=-1.0).topk(count, dim=-1)
    tokens = torch.where(scores < 0.0, torch.zeros_like(index), index // per_token)
    return scores, tokens


def restore_sinks(x: Tensor, exact: Tensor, slots: Tensor) -> Tensor:
    """Reference of the op `rotatekv::restore_sinks` (`rotatekv_fx.ops` describes it)."""
    length = x.shape[2]
    inside = (slots >= 0) & (slots < length)
    rows = torch.where(inside, slots, torch.full_like(slots, length))  # others go to a row that is cut off
    index = rows[:, None, :, None].expand(exact.shape)
    return F.pad(x, (0, 0, 0, 1)).scatter_(2, index, exact.to(x.dtype))[:, :, :length].contiguous()


def take_tokens(x: Tensor, slots: Tensor) -> Tensor:
    """Reference of the op `rotatekv::take_tokens` (`rotatekv_fx.ops` describes it)."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
