"""Attention over the cache, and the choice and restoring of sink tokens, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rotatekv_fx import masks
from rotatekv_fx.kernels.held import Held, Scoring
from rotatekv_fx.kernels.quantize.reference import dequantize, quantize


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
    # The largest of a sequence are in the tokens whose own largest are the largest: others are not ranked.
    most = torch.maximum(residual.amax(-1), -residual.amin(-1)).float()
    most = most.where(most.isfinite(), -1.0)
    if valid is not None:
        most = most.masked_fill(~valid, -1.0)
    most, best = F.pad(most, (0, count), value=-1.0).topk(count, dim=-1)
    best = best.clamp(max=residual.shape[1] - 1)
    rows = residual.gather(1, best[..., None].expand(-1, -1, residual.shape[2])).abs()
    per_token = min(count, residual.shape[2])
    largest = rows.topk(per_token, dim=-1).values.float().where(most[..., None] >= 0.0, -1.0)
    scores, index = F.pad(largest.flatten(1), (0, count), value=-1.0).topk(count, dim=-1)
    chosen = best.gather(1, (index // per_token).clamp(max=count - 1))
    return scores, torch.where(scores < 0.0, torch.zeros_like(chosen), chosen)


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


def decode(query: Tensor, key: Tensor, value: Tensor, held: Held, scoring: Scoring) -> Tensor:
    """Reference of the op `rotatekv::decode` (`rotatekv_fx.ops` describes it)."""
    extend(key, value, held)
    history, newest, window = held.history, held.start, held.window
    heads, dim = key.shape[1], key.shape[3]
    matrix, _, rotation, angles = held.key_map[:4]
    units, channels = matrix.shape[:2]
    pairs = len(angles)
    batch, repeats = query.shape[0], query.shape[1] // heads
    rows = query.float().reshape(batch, heads, repeats, dim)

    # History: scores from the codes in their own basis, and the mean's share from the position.
    numbers = _history_numbers(held.capacity, newest - window, held.wraps, query.device)
    coded = dequantize(*history[:3], held.key_bits, held.key_group, units, torch.float32)
    rotated = torch.einsum("bhrd,hdc->bhrc", rows, rotation)
    coded = coded.repeat_interleave(heads // units, 1)
    scores = rotated[..., :channels] @ coded.transpose(-1, -2)
    places = held.position.reshape(-1, 1) - newest + numbers
    turned = places.double()[..., None] * angles  # [B or 1, N, pairs]
    waves = torch.cat([turned.cos(), turned.sin()], -1).float()[:, None]
    scores = scores + rotated[..., channels : channels + 2 * pairs] @ waves.transpose(-1, -2)
    values = dequantize(*history[3:], held.value_bits, held.value_group, heads, torch.float32)
    last_coded = newest - window
    visible = (numbers >= 0) & (numbers <= last_coded) & ~(history[1][:, 0] < 0.0)  # NaN is shown
    columns = [(scores, values, numbers.expand(batch, -1), visible)]
    for keys, values, numbers, visible in _exact_columns(batch, held):
        columns.append((rows @ keys.transpose(-1, -2), values, numbers, visible))
    out = _weighted(columns, held, scoring)
    return out.reshape(batch, 1, heads * repeats, -1).to(query.dtype)


def decode_before_rope(query: Tensor, key: Tensor, value: Tensor, held: Held, scoring: Scoring) -> Tensor:
    """Reference of the op `rotatekv::decode_before_rope` (`rotatekv_fx.ops` describes it)."""
    _store(key, value, held, transforms=False)
    history, newest = held.history, held.start
    last_coded = newest - held.window
    batch, heads, _, dim = key.shape
    order, matrix, mixing, axis, size, angles = held.key_map[:6]
    rows = query.float().reshape(batch, heads, -1, dim)
    by_cos, by_sin = rows[..., axis[0].long()] * size, -rows[..., axis[1].long()] * size

    def scores_of(stored: Tensor, numbers: Tensor) -> Tensor:
        flat = stored.transpose(1, 2).flatten(2)[..., order[0].long()]  # rotated channels
        turned = flat.unflatten(-1, (-1, mixing.shape[0], dim)) @ matrix
        keys = torch.einsum("bnugd,gh->bnuhd", turned, mixing).flatten(2, 3).transpose(1, 2)
        places = held.position.reshape(-1, 1) - newest + numbers  # [B, N]
        waves = (places.double()[..., None] * angles)[:, None]
        on_cos, on_sin = keys * waves.cos().float(), keys * waves.sin().float()
        return by_cos @ on_cos.transpose(-1, -2) + by_sin @ on_sin.transpose(-1, -2)

    numbers = _history_numbers(held.capacity, last_coded, held.wraps, query.device).expand(batch, -1)
    coded = (held.key_bits, held.key_group, heads, torch.float32, order[0].long())
    keys = dequantize(*history[:3], *coded)
    values = dequantize(*history[3:], held.value_bits, held.value_group, heads, torch.float32)
    visible = (numbers >= 0) & (numbers <= last_coded) & ~(history[1][:, 0] < 0.0)  # NaN is shown
    stretches = [(keys, values, numbers, visible), *_exact_columns(batch, held)]
    columns = [(scores_of(k, n), v, n, visible) for k, v, n, visible in stretches]
    out = _weighted(columns, held, scoring)
    return out.reshape(batch, 1, query.shape[1], -1).to(query.dtype)


def _exact_columns(batch: int, held: Held) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Keys, values [B, Hkv, N, D], numbers and visibility [B, N] of the window's tokens, and of sinks that
    left it.
    """
    recent, sinks, newest, columns = held.recent, held.sinks, held.start, []
    last_coded = newest - held.window
    if recent:
        size = recent[0].shape[2]
        numbers = newest - (newest - torch.arange(size, device=recent[0].device)) % size
        near = (numbers >= 0) & (numbers > last_coded)
        exact = (x.float() for x in recent)
        columns.append((*exact, numbers.expand(batch, -1), near.expand(batch, -1)))
    if sinks:
        numbers = sinks[2].long()
        exact = (x.float() for x in sinks[:2])
        columns.append((*exact, numbers, (numbers >= 0) & (numbers <= last_coded)))
    return columns


def _weighted(columns: list[tuple[Tensor, Tensor, Tensor, Tensor]], held: Held, scoring: Scoring) -> Tensor:
    """Softmax attention [B, Hkv, r, Dv] over stretches of scores, values, numbers and visibility."""
    newest, (batch, heads, repeats, _) = held.start, columns[0][0].shape
    scores = torch.cat([c[0] for c in columns], -1) * scoring.scale
    values = torch.cat([c[1] for c in columns], 2)
    numbers = torch.cat([c[2] for c in columns], -1)
    visible = torch.cat([c[3] for c in columns], -1)
    if scoring.sliding:
        visible = visible & (numbers > newest - scoring.sliding)
    mask = scoring.mask
    if mask is not None:
        at = numbers - scoring.mask_offset
        known = (at >= 0) & (at < mask.shape[-1])
        said = mask.expand(batch, -1).gather(1, at.clamp(0, mask.shape[-1] - 1))
        visible = visible & known & masks.as_bool(said)
    if scoring.softcap != 0.0:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + said.float()[:, None, None]
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if scoring.sink_logits is not None:
        extra = scoring.sink_logits.float().reshape(1, heads, repeats, 1).expand(batch, -1, -1, -1)
        scores = torch.cat([scores, extra], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : values.shape[2]]
    values = values.masked_fill(~visible[:, None, :, None], 0.0)  # what is there may be NaN
    return weights @ values


def _history_numbers(size: int, newest: Tensor | int, wraps: bool, device: torch.device) -> Tensor:
    """Number of the token in each slot [size], where the newest is `newest`; negative where it is empty."""
    slots = torch.arange(size, device=device)
    return newest - (newest - slots) % size if wraps else slots


def extend(key: Tensor, value: Tensor, held: Held) -> None:
    """Reference of the op `rotatekv::extend` (`rotatekv_fx.ops` describes it)."""
    _store(key, value, held, transforms=True)


def _store(key: Tensor, value: Tensor, held: Held, transforms: bool) -> None:
    """Add new tokens; keys become codes as the key map says, or as they are."""
    history, recent, start, capacity, wraps = held.history, held.recent, held.start, held.capacity, held.wraps
    new = key.shape[2]
    device, leaving = key.device, min(new, capacity)
    ahead = max(0, held.window - 1)  # the oldest token of the window has its codes already
    numbers = torch.arange(leaving, device=device) + (start + new - ahead - leaving)
    if recent:
        size = recent[0].shape[2]
        from_new = (numbers - start).clamp(0, new - 1)
        is_new = (numbers >= start)[:, None]
        key_out, value_out = (
            torch.where(is_new, x[:, :, from_new].float(), ring[:, :, numbers % size].float())
            for x, ring in ((key, recent[0]), (value, recent[1]))
        )
    else:
        key_out, value_out = (x[:, :, new - leaving :].float() for x in (key, value))
    coded = _transformed(key_out, numbers, held, start + new - 1) if transforms else key_out
    places = None if transforms else held.key_map[0][0].long()
    # Tokens without a slot are written where a real one is written after them.
    placed = (numbers >= 0) if wraps else (numbers >= 0) & (numbers < capacity)
    slots = torch.where(placed, numbers % capacity if wraps else numbers, 0)
    order = torch.argsort(placed.to(torch.uint8), stable=True)
    kept = order if isinstance(start, Tensor) else order[int((~placed).sum()) :]
    parts = (
        *quantize(coded, held.key_bits, held.key_group, held.key_clip, held.scheme, places),
        *quantize(value_out, held.value_bits, held.value_group, held.value_clip, held.scheme),
    )
    if held.sinks:
        hidden = (held.sinks[2][:, :, None] == numbers).any(1)[:, None]
        parts = (parts[0], torch.where(hidden, -parts[1], parts[1]), *parts[2:])
    for buffer, part in zip(history, parts, strict=True):
        before = buffer.index_select(2, slots)
        keep = placed.view(1, 1, -1, *[1] * (part.dim() - 3))
        buffer.index_copy_(2, slots[kept], torch.where(keep, part, before)[:, :, kept])
    if recent:
        last = min(new, recent[0].shape[2])
        places = (torch.arange(new - last, new, device=device) + start) % recent[0].shape[2]
        for ring, x in zip(recent, (key, value), strict=True):
            limit = torch.finfo(ring.dtype).max
            ring.index_copy_(2, places, x[:, :, new - last :].clamp(-limit, limit).to(ring.dtype))


def _transformed(key: Tensor, numbers: Tensor, held: Held, newest: Tensor | int) -> Tensor:
    """Keys [B, Hkv, S, D] of tokens `numbers`, rotated and without their mean."""
    batch, heads, tokens, dim = key.shape
    matrix, mean, _, angles = held.key_map[:4]
    units, channels = matrix.shape[:2]
    flat = key.transpose(1, 2).reshape(batch, tokens, units, channels)
    turned = (held.position.reshape(-1, 1) - newest + numbers).double()[..., None] * angles
    waves = torch.cat([turned.cos(), turned.sin()], -1).float()
    coded = torch.einsum("bsuc,ucd->bsud", flat, matrix) - torch.einsum("bsp,upd->bsud", waves, mean)
    return coded.reshape(batch, tokens, heads, dim).transpose(1, 2)
