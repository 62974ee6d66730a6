"""Decode attention over keys stored before RoPE, rotated over G neighbouring heads and reordered over all
channels: split-KV Triton kernels.

A program serves a unit of G heads, one rotated head after another: a product with a D x D matrix undoes the
head's own factor of the rotation, and the sum over the G heads is taken of the scores, of which there are
fewer than channels. A head's channels may lie in any quantization group: their codes are gathered byte by
byte, and the scales spread from groups to channels by a product with a 0-1 matrix. RoPE goes to the query:
within a tile of consecutive tokens it is a fixed table of cosines and sines, which multiplies the key, and
query coefficients that turn by a fixed angle from tile to tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.attention.exact import exact_tokens
from rotatekv_fx.kernels.attention.scores import HIDDEN, INTERPRETED, LOWEST, capped
from rotatekv_fx.kernels.attention.triton import finish_kernel
from rotatekv_fx.kernels.held import Held
from rotatekv_fx.kernels.quantize.programs import cos_sin, product
from rotatekv_fx.kernels.quantize.triton import launch_step, quantizing

_WEIGHT_BITS = tl.constexpr(14.0)  # log 2 of the largest fp16 weight


@triton.jit
def _codes(rows, flat, keep, capacity, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Codes fp32 [tokens, channels] of stored channels `flat`; `rows` points at tokens' bytes of group 0."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    LOW: tl.constexpr = GROUP * WIDTH // 8
    group, channel = (flat // GROUP).to(tl.int64) * capacity * BYTES, flat % GROUP
    low = tl.load(rows[:, None] + (group + channel % LOW)[None, :], mask=keep, other=0).to(tl.int32)
    codes = (low >> (channel // LOW * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
    if BITS == 3:
        HIGH: tl.constexpr = GROUP // 8
        at = group + LOW + channel % HIGH
        high = tl.load(rows[:, None] + at[None, :], mask=keep, other=0).to(tl.int32)
        codes += ((high >> (channel // HIGH)[None, :]) & 1) * 4
    return codes.to(tl.float32)


@triton.jit
def _shift(scale, offset, MIDPOINT: tl.constexpr):
    """What is added to scale * code, in fp32."""
    return offset.to(tl.float32) if MIDPOINT else -scale * offset.to(tl.float32)


@triton.jit
def _values(
    head, codes_ptr, scale_ptr, offset_ptr, rows, seen, capacity,
    DV: tl.constexpr, DVP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    MIDPOINT: tl.constexpr,
):  # fmt: skip
    """Values fp16 [tokens, channels] of one head, whose tokens are at `rows` of group 0."""
    channel = tl.arange(0, DVP)
    codes = _codes(
        codes_ptr + rows * BYTES, head * DV + channel, seen[:, None] & (channel < DV)[None, :], capacity,
        GROUP, BITS, BYTES,
    )  # fmt: skip
    # channels with a scale of their own: one, where whole heads share a group
    scaled = tl.arange(0, 1 if GROUP % DV == 0 else DVP)
    at = ((head * DV + scaled) // GROUP).to(tl.int64)[None, :] * capacity + rows[:, None]
    keep = seen[:, None] & (scaled < DV)[None, :]
    step = tl.load(scale_ptr + at, mask=keep, other=0.0).to(tl.float32)
    shift = _shift(step, tl.load(offset_ptr + at, mask=keep, other=0), MIDPOINT)
    return (codes * step + shift).to(tl.float16)


@triton.jit
def _query(
    row, inside, query_ptr, channel, partner_ptr, size_ptr, D: tl.constexpr
):  # fmt: skip
    """What cosines and sines of the channels meet: fp32 [channels, rows] each."""
    real = channel < D
    partner = tl.load(partner_ptr + channel, mask=real, other=0)
    size = tl.load(size_ptr + channel, mask=real, other=0.0)[:, None]
    keep = real[:, None] & inside[None, :]
    own = tl.load(query_ptr + row[None, :] * D + channel[:, None], mask=keep, other=0.0)
    other = tl.load(query_ptr + row[None, :] * D + partner[:, None], mask=keep, other=0.0)
    return own.to(tl.float32) * size, -other.to(tl.float32) * size


@triton.jit
def _attend_history(
    batch, unit, split, splits, part, first, last, position, query_ptr,
    order_ptr, matrix_ptr, mixing_ptr, partner_ptr, size_ptr, angle_ptr, table_ptr,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    mask_ptr, mask_stride, mask_offset, mask_columns, scale, softcap, units, out_ptr, weight_ptr,
    G: tl.constexpr, REPEATS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr, KGP: tl.constexpr,
    KGROUP: tl.constexpr, VGROUP: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KBYTES: tl.constexpr, VBYTES: tl.constexpr, N: tl.constexpr,
    MIDPOINT: tl.constexpr, WRAPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Weights and values of one share of the history."""
    R: tl.constexpr = G * REPEATS
    rows, tokens, group = tl.arange(0, M), tl.arange(0, N), tl.arange(0, KGP)
    channel, value_channel = tl.arange(0, DP), tl.arange(0, DVP)
    inside, real = rows < R, channel < D
    skipped = first // N
    tiles = tl.cdiv(tl.cdiv(last, N) - skipped, splits)
    start = (skipped + split * tiles) * N
    stop = tl.minimum(start + tiles * N, last)
    key_rows = (batch * KG).to(tl.int64) * capacity
    value_rows = (batch * VG).to(tl.int64) * capacity
    angles = tl.load(angle_ptr + channel, mask=real, other=0.0)
    table = table_ptr + tokens[:, None] * (2 * D) + channel[None, :]
    cos, sin = cos_sin((position + start).to(tl.float64) * angles)
    cos, sin = cos[:, None], sin[:, None]
    turn_cos, turn_sin = cos_sin(N * angles)
    turn_cos, turn_sin = turn_cos[:, None], turn_sin[:, None]
    matrix = tl.load(
        matrix_ptr + channel[:, None] * D + channel[None, :], mask=real[:, None] & real[None, :], other=0.0
    ).to(tl.float16)

    # The unit's largest query channel is brought to 1, so that fp16 holds all.
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    on_cos, on_sin = _query(row, inside, query_ptr, channel, partner_ptr, size_ptr, D)
    largest = tl.maximum(tl.max(tl.max(tl.abs(on_cos), 1), 0), 1.0e-30)
    on_cos, on_sin = on_cos / largest, on_sin / largest
    by_cos, by_sin = on_cos * cos + on_sin * sin, on_sin * cos - on_cos * sin
    highest = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    accumulator = tl.zeros([DVP, M], tl.float32)

    for n0 in tl.range(start, stop, N):
        number = n0 + tokens
        held = (number >= first) & (number < stop)
        slot = number.to(tl.int64)
        if WRAPS:
            slot = slot % capacity
        seen = tl.load(key_scale + key_rows + slot, mask=held, other=-1.0).to(tl.float32) > 0.0
        if MASKED:
            column = number - mask_offset
            known = held & (column >= 0) & (column < mask_columns)  # columns without a word are hidden
            shown = tl.load(mask_ptr + batch.to(tl.int64) * mask_stride + column, mask=known, other=0)
            seen = seen & (shown != 0)
        at = key_rows + group.to(tl.int64)[None, :] * capacity + slot[:, None]
        keep = seen[:, None] & (group < KG)[None, :]
        step = tl.load(key_scale + at, mask=keep, other=0.0)
        shift = _shift(step.to(tl.float32), tl.load(key_offset + at, mask=keep, other=0), MIDPOINT)
        shift_high = shift.to(tl.float16)
        shift_low = (shift - shift_high.to(tl.float32)).to(tl.float16)
        scores = tl.zeros([N, M], tl.float32)
        for g in range(G):
            stored = tl.load(order_ptr + (unit * G + g) * D + channel, mask=real, other=0)
            spread = (group[:, None] == (stored // KGROUP)[None, :]) & real[None, :]
            spread = tl.where(spread, 1.0, 0.0).to(tl.float16)
            codes = _codes(
                key_codes + (key_rows + slot) * KBYTES, stored, held[:, None] & real[None, :], capacity,
                KGROUP, KBITS, KBYTES,
            )  # fmt: skip
            key = codes * tl.dot(step, spread, tl.zeros([N, DP], tl.float32))
            key = tl.dot(shift_low, spread, tl.dot(shift_high, spread, key))
            key = tl.dot(key.to(tl.float16), matrix, tl.zeros([N, DP], tl.float32))
            table_cos = tl.load(table, mask=real[None, :], other=0.0)
            table_sin = tl.load(table + D, mask=real[None, :], other=0.0)
            own = tl.dot(
                (key * table_cos).to(tl.float16), by_cos.to(tl.float16), tl.zeros([N, M], tl.float32)
            )
            own = tl.dot((key * table_sin).to(tl.float16), by_sin.to(tl.float16), own)
            mixing = tl.load(mixing_ptr + g * G + rows // REPEATS, mask=inside, other=0.0)
            scores += own * mixing[None, :]
        by_cos, by_sin = by_cos * turn_cos + by_sin * turn_sin, by_sin * turn_cos - by_cos * turn_sin
        scores = capped(scores * (largest * scale), softcap, SOFTCAP)
        scores = tl.where(seen[:, None], scores, HIDDEN)
        top = tl.maximum(highest, tl.max(scores, 0))
        fade = tl.exp2(highest - top)
        weights = tl.exp2(scores - (top - _WEIGHT_BITS)[None, :])
        highest = top
        total = total * fade + tl.sum(weights, 0)
        accumulator *= fade[None, :]
        for g in range(G):
            values = _values(
                unit * G + g, value_codes, value_scale, value_offset, value_rows + slot, seen, capacity,
                DV, DVP, VGROUP, VBITS, VBYTES, MIDPOINT,
            )  # fmt: skip
            own = tl.where((rows // REPEATS == g)[None, :], weights, 0.0).to(tl.float16)
            accumulator = tl.dot(tl.trans(values), own, accumulator)

    at = part * R + rows
    tl.store(weight_ptr + at * 2, highest - _WEIGHT_BITS, mask=inside)
    tl.store(weight_ptr + at * 2 + 1, total, mask=inside)
    tl.store(
        out_ptr + at[None, :] * DV + value_channel[:, None], accumulator,
        mask=inside[None, :] & (value_channel < DV)[:, None],
    )  # fmt: skip


@triton.jit
def _attend_exact(
    batch, unit, tile, part, newest, earliest, position, query_ptr,
    order_ptr, matrix_ptr, mixing_ptr, partner_ptr, size_ptr, angle_ptr,
    recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns, scale, softcap, units, out_ptr, weight_ptr,
    G: tl.constexpr, REPEATS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, NE: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Weights and values of one tile of sinks that left the window, or of the window's tokens."""
    R: tl.constexpr = G * REPEATS
    rows, channel, value_channel = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP)
    inside, real, value_real = rows < R, channel < D, value_channel < DV
    number, seen, keys, values, rows_held, slot = exact_tokens(
        batch, tile, newest, earliest, recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
        mask_ptr, mask_stride, mask_offset, mask_columns, SINKS, WINDOW, NE, MASKED,
    )  # fmt: skip
    angles = tl.load(angle_ptr + channel, mask=real, other=0.0)
    cos, sin = cos_sin((position + number).to(tl.float64)[:, None] * angles[None, :])
    matrix = tl.load(
        matrix_ptr + channel[:, None] * D + channel[None, :], mask=real[:, None] & real[None, :], other=0.0
    )
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    on_cos, on_sin = _query(row, inside, query_ptr, channel, partner_ptr, size_ptr, D)
    first_head = (batch * units * G).to(tl.int64)
    scores = tl.zeros([NE, M], tl.float32)
    for g in range(G):
        stored = tl.load(order_ptr + (unit * G + g) * D + channel, mask=real, other=0)
        source = ((first_head + stored // D) * rows_held)[None, :] + slot[:, None]
        key = tl.load(
            keys + source * D + (stored % D)[None, :], mask=seen[:, None] & real[None, :], other=0.0
        )
        if key.dtype == tl.float32 or INTERPRETED:
            key = product(key, matrix, tl.zeros([NE, DP], tl.float32))
        else:
            key = tl.dot(key, matrix.to(key.dtype), tl.zeros([NE, DP], tl.float32))
        own = product(key * sin, on_sin, product(key * cos, on_cos, tl.zeros([NE, M], tl.float32)))
        mixing = tl.load(mixing_ptr + g * G + rows // REPEATS, mask=inside, other=0.0)
        scores += own * mixing[None, :]
    scores = capped(scores * scale, softcap, SOFTCAP)
    scores = tl.where(seen[:, None], scores, HIDDEN)
    highest = tl.maximum(tl.max(scores, 0), LOWEST)
    weights = tl.exp2(scores - highest[None, :])
    result = tl.zeros([DVP, M], tl.float32)
    for g in range(G):
        place = (first_head + unit * G + g) * rows_held + slot
        value = tl.load(
            values + place[None, :] * DV + value_channel[:, None],
            mask=seen[None, :] & value_real[:, None], other=0.0,
        )  # fmt: skip
        result = product(value, tl.where((rows // REPEATS == g)[None, :], weights, 0.0), result)
    at = part * R + rows
    tl.store(weight_ptr + at * 2, highest, mask=inside)
    tl.store(weight_ptr + at * 2 + 1, tl.sum(weights, 0), mask=inside)
    tl.store(
        out_ptr + at[None, :] * DV + value_channel[:, None], result,
        mask=inside[None, :] & value_real[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["number", "mask_offset", "mask_columns", "mask_stride"])
def before_rope_kernel(
    count_ptr, number, query_ptr,
    order_ptr, matrix_ptr, mixing_ptr, partner_ptr, size_ptr, angle_ptr, table_ptr,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns, position_ptr, position_stride,
    scale, softcap, units, out_ptr, weight_ptr,
    COUNTED: tl.constexpr, G: tl.constexpr, REPEATS: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    KG: tl.constexpr, VG: tl.constexpr, KGP: tl.constexpr, KGROUP: tl.constexpr, VGROUP: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KBYTES: tl.constexpr, VBYTES: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, SLIDING: tl.constexpr, N: tl.constexpr, NE: tl.constexpr,
    MIDPOINT: tl.constexpr, WRAPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * units, splits + tiles): shares of the history first, then tiles of exact tokens.

    `number` is the new token's (read from `count_ptr` where COUNTED), `scale` in units of log 2. out fp32
    [B, units, parts, R, DV], weights fp32 [B, units, parts, R, 2]: each part's base and its sum of weights.
    """
    EXACT: tl.constexpr = (SINKS + NE - 1) // NE + (WINDOW + NE - 1) // NE
    newest = number
    if COUNTED:
        newest = tl.load(count_ptr).to(tl.int32)
    batch, unit = tl.program_id(0) // units, tl.program_id(0) % units
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    earliest = newest * 0
    if SLIDING > 0:
        earliest = tl.maximum(newest - SLIDING + 1, 0)
    position = tl.load(position_ptr + batch * position_stride).to(tl.int32) - newest
    split, splits = tl.program_id(1), tl.num_programs(1) - EXACT
    if split < splits:
        _attend_history(
            batch, unit, split, splits, part, earliest, tl.maximum(newest + 1 - WINDOW, earliest), position,
            query_ptr, order_ptr, matrix_ptr, mixing_ptr, partner_ptr, size_ptr, angle_ptr, table_ptr,
            key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
            mask_ptr, mask_stride, mask_offset, mask_columns, scale, softcap, units, out_ptr, weight_ptr,
            G, REPEATS, M, D, DV, DP, DVP, KG, VG, KGP, KGROUP, VGROUP, KBITS, VBITS, KBYTES, VBYTES,
            N, MIDPOINT, WRAPS, MASKED, SOFTCAP,
        )  # fmt: skip
    elif EXACT > 0:
        _attend_exact(
            batch, unit, split - splits, part, newest, earliest, position, query_ptr,
            order_ptr, matrix_ptr, mixing_ptr, partner_ptr, size_ptr, angle_ptr,
            recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
            mask_ptr, mask_stride, mask_offset, mask_columns, scale, softcap, units, out_ptr, weight_ptr,
            G, REPEATS, M, D, DV, DP, DVP, SINKS, WINDOW, NE, MASKED, SOFTCAP,
        )  # fmt: skip


def decode_before_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: Held,
    mask: Tensor | None,
    mask_offset: int,
    sliding: int,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """The op `rotatekv::decode_before_rope` (`rotatekv_fx.ops` describes it), in three launches."""
    batch, query_heads, _, dim = query.shape
    heads, value_dim = key.shape[1], value.shape[3]
    query, key, value = (x.contiguous() for x in (query, key, value))
    mask = None if mask is None else mask.contiguous()
    history, sinks, window = held.history, held.sinks, held.window
    position = held.position.contiguous()
    counter = position if held.count is None else held.count
    codes = quantizing(key, value, held, transforms=False)
    before, after = (0, codes.programs) if window else (codes.programs, 0)
    launch_step(codes, held, 1 if held.recent else 0, before)
    group = held.key_map[2].shape[0]
    units, repeats = heads // group, query_heads // heads
    rows = group * repeats
    sink_count = sinks[2].shape[1] if sinks else 0
    tile, exact_tile = tuning.BEFORE_ROPE_TILE, 16
    exact_tiles = triton.cdiv(sink_count, exact_tile) + triton.cdiv(window, exact_tile)
    splits = tuning.before_rope_splits(query.device, batch * units, held.capacity)
    count_parts = splits + exact_tiles
    parts = query.new_empty((batch * units, count_parts, rows, value_dim), dtype=torch.float32)
    weights = query.new_empty((batch * units, count_parts, rows, 2), dtype=torch.float32)
    out = query.new_empty((batch, 1, query_heads, value_dim))
    recent_keys, recent_values = held.recent or sinks[:2] or (key, value)  # of the sinks' dtype
    sink_keys, sink_values, sink_tokens = sinks or (recent_keys, recent_values, position)
    shown = position if mask is None else mask.view(torch.int8)
    before_rope_kernel[(batch * units, count_parts)](
        counter, held.number, query, *held.key_map, *history, held.capacity,
        recent_keys, recent_values, recent_keys.shape[2], sink_keys, sink_values, sink_tokens,
        shown, 0 if mask is None or mask.shape[0] == 1 else mask.stride(0), mask_offset,
        0 if mask is None else mask.shape[1], position, 0 if position.shape[0] == 1 else 1,
        scale * math.log2(math.e), softcap, units, parts, weights,
        COUNTED=held.count is not None, G=group, REPEATS=repeats, M=max(8, triton.next_power_of_2(rows)),
        D=dim, DV=value_dim, DP=triton.next_power_of_2(dim), DVP=triton.next_power_of_2(value_dim),
        KG=history[0].shape[1], VG=history[3].shape[1],
        KGP=max(16, triton.next_power_of_2(history[0].shape[1])),
        KGROUP=held.key_group, VGROUP=held.value_group, KBITS=held.key_bits, VBITS=held.value_bits,
        KBYTES=history[0].shape[3], VBYTES=history[3].shape[3],
        SINKS=sink_count, WINDOW=window,
        SLIDING=sliding, N=tile, NE=exact_tile, MIDPOINT=held.scheme == "midpoint", WRAPS=held.wraps,
        MASKED=mask is not None, SOFTCAP=softcap != 0.0, num_warps=4, num_stages=1,
    )  # fmt: skip
    block, columns = tuning.combine_block(count_parts, value_dim)
    finish_kernel[(after + batch * query_heads * triton.cdiv(value_dim, columns),)](
        counter, held.number, after, parts, weights,
        weights if sink_logits is None else sink_logits, out, count_parts, rows, *codes.arguments,
        COUNTED=held.count is not None, QUANTIZES=after > 0,
        HAS_LOGITS=0 if sink_logits is None else query_heads, BLOCK=block, COLUMNS=columns,
        DEPENDENT=False, **codes.constants, num_warps=tuning.step_warps(codes.rows), maxnreg=128,
    )  # fmt: skip
    return out
