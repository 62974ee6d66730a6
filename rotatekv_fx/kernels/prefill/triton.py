"""Attention of several new tokens over a packed layer: SDPA over what is read through the codes, and a band
of exact tokens that a kernel adds to it.

A query reads tokens further back than the window through their codes. Those are restored once for the call,
in the model's dtype, for one layer: then plain causal SDPA applies, shifted by the window, and its
log-sum-exp allows to add the band.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotatekv_fx.kernels.held import Held
from rotatekv_fx.kernels.quantize.programs import cos_sin, product, wave_product
from rotatekv_fx.kernels.quantize.triton import extend

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2E = tl.constexpr(1.4426950408889634)
_ROWS = 64  # queries of a program
_TOKENS, _COLUMNS = 128, 64  # tokens and channels of a program that restores them
_LEAST_CUDNN = 256  # keys for which cuDNN is asked; it refuses one


@triton.jit
def _codes(
    codes_ptr, at, channel, inside,
    GROUP: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Codes int32 [tokens, channels] of groups at `at`, [tokens, channels or 1] (layout: op `quantize`)."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    WIDTH: tl.constexpr = GROUP * LOW // 8
    within = channel % GROUP
    byte = tl.load(codes_ptr + at * BYTES + (within % WIDTH)[None, :], mask=inside, other=0).to(tl.int32)
    codes = (byte >> (LOW * (within // WIDTH))[None, :]) & ((1 << LOW) - 1)
    if BITS == 3:
        HIGH: tl.constexpr = GROUP // 8
        place = codes_ptr + at * BYTES + WIDTH + (within % HIGH)[None, :]
        codes += 4 * ((tl.load(place, mask=inside, other=0).to(tl.int32) >> (within // HIGH)[None, :]) & 1)
    return codes


@triton.jit
def _dequantized(codes, scale, offset, MIDPOINT: tl.constexpr):
    """Numbers in fp32 that codes, or sums over them, stand for: scale * codes + the offset's share."""
    if MIDPOINT:
        return offset + scale * codes
    return scale * (codes - offset)


@triton.jit(do_not_specialize=["length", "capacity", "rows"])
def restore_kernel(
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    rotation_ptr, angle_ptr, shift_ptr, shift_stride, keys_ptr, values_ptr, length, rows, heads, units,
    D: tl.constexpr, DV: tl.constexpr, KG: tl.constexpr, KGROUP: tl.constexpr, KGROUP_PADDED: tl.constexpr,
    VGROUP: tl.constexpr, KBYTES: tl.constexpr, VBYTES: tl.constexpr, KBITS: tl.constexpr,
    VBITS: tl.constexpr, PAIRS: tl.constexpr, MIDPOINT: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, tiles of N tokens, tiles of COLUMNS channels): keys and values [B, Hkv, rows, D] of the
    first `length` tokens.
    """
    number = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)
    head = tl.program_id(0).to(tl.int64)
    batch, within = head // heads, head % heads
    inside = number < length
    WIDTH: tl.constexpr = KG * KGROUP + 2 * PAIRS
    channel = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < D
    rotation = rotation_ptr + (within * D + channel)[None, :] * WIDTH
    first_group = (batch * units + within // (heads // units)) * KG
    place = tl.arange(0, KGROUP_PADDED)
    keys = tl.zeros([N, COLUMNS], tl.float32)
    for g in tl.static_range(KG):
        at = (first_group + g) * capacity + number
        codes = _codes(
            key_codes, at[:, None], place, inside[:, None] & (place < KGROUP)[None, :], KGROUP, KBYTES, KBITS
        )
        weights = tl.load(
            rotation + (g * KGROUP + place)[:, None], mask=known[None, :] & (place < KGROUP)[:, None],
            other=0.0,
        )  # fmt: skip
        scale = tl.abs(tl.load(key_scale + at, mask=inside, other=0.0).to(tl.float32))[:, None]
        offset = tl.load(key_offset + at, mask=inside, other=0).to(tl.float32)[:, None]
        sums = product(codes.to(tl.float16), weights, tl.zeros([N, COLUMNS], tl.float32))
        keys += _dequantized(sums, scale, offset * tl.sum(weights, 0)[None, :], MIDPOINT)
    if PAIRS > 0:
        pair = tl.arange(0, PAIRS)
        position = tl.load(shift_ptr + batch * shift_stride).to(tl.int64) + number
        cos, sin = cos_sin(position[:, None].to(tl.float64) * tl.load(angle_ptr + pair)[None, :])
        waves = rotation + (KG * KGROUP + pair)[:, None]
        keys = wave_product(cos, tl.load(waves, mask=known[None, :], other=0.0), keys)
        keys = wave_product(sin, tl.load(waves + PAIRS, mask=known[None, :], other=0.0), keys)
    row = (head * rows + number)[:, None]
    kind = keys_ptr.dtype.element_ty
    tl.store(keys_ptr + row * D + channel[None, :], keys.to(kind), mask=inside[:, None] & known[None, :])
    shown = inside[:, None] & (channel < DV)[None, :]
    flat = within * DV + channel
    at = (batch * (heads * DV // VGROUP) + flat // VGROUP)[None, :] * capacity + number[:, None]
    values = _dequantized(
        _codes(value_codes, at, flat, shown, VGROUP, VBYTES, VBITS).to(tl.float32),
        tl.load(value_scale + at, mask=shown, other=0.0).to(tl.float32),
        tl.load(value_offset + at, mask=shown, other=0).to(tl.float32),
        MIDPOINT,
    )
    tl.store(values_ptr + row * DV + channel[None, :], values.to(kind), mask=shown)


@triton.jit
def _row_of(x_ptr, strides, batch, head, row):
    """Pointers [rows, 1] to tokens of one head."""
    return x_ptr + batch * strides[0] + head * strides[1] + row[:, None].to(tl.int64) * strides[2]


@triton.jit(do_not_specialize=["tokens", "held", "far_skip", "near_skip"])
def band_kernel(
    query_ptr, query_strides, key_ptr, value_ptr, far_ptr, far_strides, far_lse_ptr, far_skip,
    near_ptr, near_strides, near_lse_ptr, near_skip, out_ptr, tokens, held, heads, scale,
    REPEATS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    WINDOW: tl.constexpr, FAR: tl.constexpr, NEAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hq, tiles of ROWS queries): the window's exact tokens, and up to two parts already attended.

    key, value [B, Hkv, held, D]: the window before the first new token, if there is one, and the new tokens.
    far, near [B, Hq, tokens - skip, DV] with natural log-sum-exps: parts that queries from `skip` on have.
    Strides are those of sequences, heads and tokens.
    """
    tile, head = tl.program_id(1), tl.program_id(0).to(tl.int64)
    batch, own_head = head // heads, head % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    channel, value_channel, block = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, BLOCK)
    inside = row < tokens
    query = tl.load(
        _row_of(query_ptr, query_strides, batch, own_head, row) + channel[None, :],
        mask=inside[:, None] & (channel < D)[None, :], other=0.0,
    )  # fmt: skip
    kv_head = head // REPEATS
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DVP], tl.float32)
    if FAR:
        own = inside & (row >= far_skip)
        lse = tl.load(far_lse_ptr + head * (tokens - far_skip) + row - far_skip, mask=own, other=-1.0e30)
        part = tl.load(
            _row_of(far_ptr, far_strides, batch, own_head, row - far_skip) + value_channel[None, :],
            mask=own[:, None] & (value_channel < DV)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        highest = tl.where(own, lse * _LOG2E, highest)
        total = tl.where(own, 1.0, 0.0)
        values += part
    if NEAR:
        own = inside & (row >= near_skip)
        lse = tl.load(near_lse_ptr + head * (tokens - near_skip) + row - near_skip, mask=own, other=-1.0e30)
        lse = tl.where(own, lse * _LOG2E, -1.0e30)
        part = tl.load(
            _row_of(near_ptr, near_strides, batch, own_head, row - near_skip) + value_channel[None, :],
            mask=own[:, None] & (value_channel < DV)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        top = tl.maximum(highest, lse)
        fade, weight = tl.exp2(highest - top), tl.where(own, tl.exp2(lse - top), 0.0)
        total = total * fade + weight
        values = values * fade[:, None] + part * weight[:, None]
        highest = top
    # new token t of the prompt is held at t + held - tokens
    shift = held - tokens
    if WINDOW > 0:
        low = tl.maximum(tile * ROWS + shift - WINDOW + 1, 0) // BLOCK * BLOCK
        for first in range(low, tl.minimum(tile * ROWS + ROWS, tokens) + shift, BLOCK):
            index = first + block
            there = index < held
            key = tl.load(
                key_ptr + (kv_head * held + index)[None, :] * D + channel[:, None],
                mask=there[None, :] & (channel < D)[:, None], other=0.0,
            )  # fmt: skip
            distance = (row + shift)[:, None] - index[None, :]
            seen = (distance >= 0) & (distance < WINDOW) & there[None, :]
            if _INTERPRETED:
                scores = tl.dot(query.to(tl.float32), key.to(tl.float32)) * (scale * _LOG2E)
            else:
                scores = tl.dot(query, key, input_precision="ieee") * (scale * _LOG2E)
            scores = tl.where(seen, scores, -2.0e30)
            top = tl.maximum(highest, tl.max(scores, 1))
            fade, weights = tl.exp2(highest - top), tl.exp2(scores - top[:, None])
            value = tl.load(
                value_ptr + (kv_head * held + index)[:, None] * DV + value_channel[None, :],
                mask=there[:, None] & (value_channel < DV)[None, :], other=0.0,
            )  # fmt: skip
            total = total * fade + tl.sum(weights, 1)
            values = values * fade[:, None]
            if _INTERPRETED:
                values = tl.dot(weights, value.to(tl.float32), values)
            else:
                values = tl.dot(weights.to(value.dtype), value, values, input_precision="ieee")
            highest = top
    out = values / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out_ptr + ((batch * tokens + row) * heads + own_head)[:, None] * DV + value_channel[None, :],
        out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (value_channel < DV)[None, :],
    )  # fmt: skip


def prefill(query: Tensor, key: Tensor, value: Tensor, held: Held, scale: float) -> Tensor:
    """The op `rotatekv::prefill` (`rotatekv_fx.ops` describes it)."""
    key, value = key.contiguous(), value.contiguous()
    query = query if query.stride(3) == 1 else query.contiguous()
    batch, query_heads, new, dim = query.shape
    heads, value_dim = key.shape[1], value.shape[3]
    number, window = held.number, held.window
    exact_keys, exact_values = key, value
    before = min(number, window)
    if before:
        slots = torch.arange(number - before, number, device=key.device) % held.recent[0].shape[2]
        exact_keys, exact_values = (
            torch.cat([ring[:, :, slots].to(x.dtype), x], 2)
            for ring, x in zip(held.recent, (key, value), strict=True)
        )
    extend(key, value, held)
    coded = max(0, number + new - window)
    parts: list[tuple[Tensor, Tensor, int]] = []
    if coded:
        keys, values = _restored(held, held.position - (number + new - 1), coded, key, value)
        common = max(0, number - window)  # coded tokens that every query reads
        skip = max(0, window - number)  # queries that read none of the others
        if common:
            parts.append((*_attention(query, keys[:, :, :common], values[:, :, :common], False, scale), 0))
        rest = query[:, :, skip:], keys[:, :, common:], values[:, :, common:]
        parts.append((*_attention(*rest, True, scale), skip))
    out = query.new_empty((batch, new, query_heads, value_dim))
    far, near = [(x, x.stride()[:3], lse, skip) for x, lse, skip in [*parts, *[(query, query, 0)] * 2][:2]]
    band_kernel[(batch * query_heads, triton.cdiv(new, _ROWS))](
        query, query.stride()[:3], exact_keys, exact_values, *far, *near, out, new, exact_keys.shape[2],
        query_heads, scale,
        REPEATS=query_heads // heads, D=dim, DP=triton.next_power_of_2(dim), DV=value_dim,
        DVP=triton.next_power_of_2(value_dim),
        WINDOW=window, FAR=len(parts) > 0, NEAR=len(parts) > 1, ROWS=_ROWS, BLOCK=64, num_warps=4,
        num_stages=2,
    )  # fmt: skip
    return out


def _restored(held: Held, shift: Tensor, length: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `length` tokens as attention reads them, in the dtype of `key`."""
    batch, heads, _, dim = key.shape
    value_dim, rows = value.shape[3], length + 1  # the last row takes what has no place
    keys, values = key.new_empty((batch, heads, rows, dim)), value.new_empty((batch, heads, rows, value_dim))
    shift = shift.contiguous()
    tiles = batch * heads, triton.cdiv(length, _TOKENS), triton.cdiv(max(dim, value_dim), _COLUMNS)
    restore_kernel[tiles](
        *held.history, held.capacity, *held.key_map[2:4], shift, 0 if shift.shape[0] == 1 else 1,
        keys, values, length, rows, heads, held.units,
        D=dim, DV=value_dim, KG=held.unit_groups(key, value)[0], KGROUP=held.key_group,
        KGROUP_PADDED=triton.next_power_of_2(held.key_group), VGROUP=held.value_group,
        KBYTES=held.history[0].shape[3], VBYTES=held.history[3].shape[3], KBITS=held.key_bits,
        VBITS=held.value_bits, PAIRS=len(held.key_map[3]), MIDPOINT=held.scheme == "midpoint", N=_TOKENS,
        COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    if held.sinks:
        exact_keys, exact_values, tokens = held.sinks
        place = torch.where((tokens >= 0) & (tokens < length), tokens, length).long()[:, None, :, None]
        for whole, exact in ((keys, exact_keys), (values, exact_values)):
            whole.scatter_(2, place.expand(exact.shape), exact.to(whole.dtype))
    return keys[:, :, :length], values[:, :, :length]


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """SDPA, [B, Hq, S, D], and its natural log-sum-exp [B, Hq, S]; it is square where it is causal."""
    aten = torch.ops.aten
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if query.shape[3] <= 128 and keys.shape[2] >= _LEAST_CUDNN and torch.backends.cudnn.is_available():
            found = aten._scaled_dot_product_cudnn_attention(
                query, keys, values, None, True, 0.0, causal, False, scale=scale
            )
        else:
            found = aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, scale=scale)
    else:
        keys, values = (x.repeat_interleave(query.shape[1] // keys.shape[1], 1) for x in (keys, values))
        if query.is_cuda:
            found = aten._scaled_dot_product_efficient_attention(
                query, keys, values, None, True, 0.0, causal, scale=scale
            )
        else:
            found = aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, 0.0, causal, scale=scale
            )
    logs = found[1].float().flatten(2)[:, :, : query.shape[2]]  # some are padded
    return found[0], logs.contiguous()
