"""Decode attention over packed history, sinks and recent tokens: split-KV Triton kernels.

The inverse rotation of the keys is applied to the query once, so codes enter the products as they are, and a
group's scale and offset are applied to its scores. The mean's share of a score is a sum of cosines and sines
of the token's position. Within a tile of consecutive tokens that is the product of a fixed table, cos(j t)
and sin(j t), with coefficients that turn by a fixed angle from tile to tile: nothing is read for it.

Codes are never converted. Words of 16 bits are masked, and what is left is read as a subnormal fp16 number,
code * 2^(bit - 24), which tensor cores multiply exactly; 2^-bit goes to the query's channel and to the
output's, 2^24 to the scales.

A token's value scale is part of its weight, as its logarithm in the score: fp16 then holds the weights of any
scale, and the sums of weights and offsets divide it out again. Scales are read a tile ahead of their use.

Three launches make a step: `step_kernel` (rotate the query, store the new token), `decode_kernel` (parts of
the sums over tokens) and `finish_kernel` (combine the parts, and quantize the token that the next step reads
through its codes; without a window that is the new one, and the first launch does it). On Hopper the later
two start early and wait where they need results of the one before.

A program is one warp, so that its scores stay in its registers on the way to the values. Heads that share a
quantization group or a rotation form a unit of U heads: R = U * r query rows (r = Hq / Hkv) meet all channels
of the unit, and the rows' own head picks its share of the values at the end.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.held import Held
from rotatekv_fx.kernels.quantize.triton import cos_sin, launch_step, quantize_program, quantizing

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(-1.0e30)  # score of a hidden token
_LOWEST = tl.constexpr(-5.0e29)  # where the running maximum starts: hidden tokens weigh 2^-5e29 = 0
_CODE_UNIT = tl.constexpr(16777216.0)  # 2^24, the inverse of the fp16 subnormal 1
_WEIGHT_BITS = tl.constexpr(14.0)  # log 2 of the largest fp16 weight


@triton.jit
def masked_bits(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """(words >> SHIFT) & MASK of int16 words, read as fp16. On a GPU two words at a time; bits that the
    shift brings over from the neighbour are masked away.
    """
    mask = tl.full(words.shape, MASK, tl.int16)
    if _INTERPRETED:
        bits = ((words.to(tl.int32) >> SHIFT) & MASK).to(tl.int16)
    elif SHIFT == 0:
        bits = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2
        )
    elif SHIFT == 8:
        bits = tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, $2;}",
            "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tl.static_assert(SHIFT == 10)
        bits = tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 10; and.b32 $0, t, $2;}",
            "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def code_plane(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Codes at bits PLANE * BITS of int16 words, as fp16: code * 2^(plane_bit(PLANE, BITS) - 24)."""
    BIT: tl.constexpr = PLANE * BITS
    SHIFT: tl.constexpr = 0 if BIT + BITS <= 10 else (10 if BITS <= 2 else 8)
    return masked_bits(words, SHIFT, ((1 << BITS) - 1) << (BIT - SHIFT))


@triton.jit
def plane_factor(PLANE: tl.constexpr, BITS: tl.constexpr):
    """2^-bit of a plane once it is shifted: what undoes its place in the word."""
    BIT: tl.constexpr = PLANE * BITS
    SHIFT: tl.constexpr = 0 if BIT + BITS <= 10 else (10 if BITS <= 2 else 8)
    return 1.0 / (1 << (BIT - SHIFT))


@triton.jit
def plane_channels(word, PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Channels of a group whose codes are in a plane of given words (byte layout: op `quantize`)."""
    BIT: tl.constexpr = PLANE * BITS
    return (BIT % 8) // BITS * (GROUP * BITS // 8) + 2 * word + BIT // 8


@triton.jit
def _query_plane(row_ptr, keep, word, PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The query rows' channels of one plane, [words, M], scaled to its place in the word."""
    channel = plane_channels(word, PLANE, BITS, GROUP)
    return tl.load(row_ptr[None, :] + channel[:, None], mask=keep, other=0.0) * plane_factor(PLANE, BITS)


@triton.jit
def _split_dot(a, b, acc):
    """acc + a @ b for fp32 b and 16-bit a: b as the sum of two 16-bit numbers."""
    if _INTERPRETED:  # the interpreter multiplies the bits of bfloat16
        return tl.dot(a.to(tl.float32), b, acc)
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    return tl.dot(a, low, tl.dot(a, high, acc))


@triton.jit
def _prefetch(pointers):
    """Bring what pointers point at to the L2 cache."""
    tl.inline_asm_elementwise(
        "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shown(x, seen, other, MASKED: tl.constexpr):
    """Tokens' numbers in fp32; those of masked tokens, which may be NaN, replaced."""
    x = x.to(tl.float32)
    return tl.where(seen, x, other) if MASKED else x


@triton.jit
def _fast_log2(x):
    if _INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _fast_inverse(x):
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _by_residue(x, N: tl.constexpr, M: tl.constexpr):
    """x [N, M] summed to [16, M]: a tensor-core tile's rows are in registers of one thread."""
    return tl.sum(tl.reshape(x, [N // 16, 16, M]), 0)


@triton.jit
def _capped(score, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(score / softcap), in and out in units of log 2."""
    if SOFTCAP:
        cap = softcap * _LOG2E
        score = cap * (1.0 - 2.0 / (tl.exp2(score / softcap * 2.0) + 1.0))
    return score


@triton.jit
def _token_data(
    n0, first, stop, key_scale, key_offset, value_scale, value_offset,
    mask_ptr, mask_offset, mask_columns, capacity,
    KG: tl.constexpr, VG: tl.constexpr, N: tl.constexpr, WRAPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scales and offsets of a tile's tokens, group by group, and whether the mask shows them."""
    number = n0 + tl.arange(0, N)
    held = (number >= first) & (number < stop)
    slot = number
    if WRAPS:
        slot = number % capacity
    data = ()
    for g in tl.static_range(KG):
        base = (key_scale + g * tl.cast(capacity, tl.int64)) + slot
        data = data + (tl.load(base, mask=held, other=-1.0),)
        base = (key_offset + g * tl.cast(capacity, tl.int64)) + slot
        data = data + (tl.load(base, mask=held, other=0),)
    for g in tl.static_range(VG):
        base = (value_scale + g * tl.cast(capacity, tl.int64)) + slot
        data = data + (tl.load(base, mask=held, other=1.0),)
        base = (value_offset + g * tl.cast(capacity, tl.int64)) + slot
        data = data + (tl.load(base, mask=held, other=0),)
    if MASKED:
        column = number - mask_offset
        known = held & (column >= 0) & (column < mask_columns)  # columns without a word are hidden
        data = data + (tl.load(mask_ptr + column, mask=known, other=0),)
    return data


@triton.jit
def _history(
    batch, unit, split, splits, part, first, last,
    rotated_ptr, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    position, angle_ptr, table_ptr, softcap, capacity, units, out_ptr, weight_ptr,
    R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr, DV: tl.constexpr,
    KG: tl.constexpr, VG: tl.constexpr, KGROUP: tl.constexpr, VGROUP: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KWORDS: tl.constexpr, VWORDS: tl.constexpr,
    KWP: tl.constexpr, VWP: tl.constexpr, CP: tl.constexpr,
    PAIRS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, MIDPOINT: tl.constexpr,
    WRAPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Weights and values of one share of the history."""
    # Words of a group, padded to a tensor-core step; 3-bit codes are a 2-bit plane and a 1-bit plane.
    KLOW: tl.constexpr = 2 if KBITS == 3 else KBITS
    VLOW: tl.constexpr = 2 if VBITS == 3 else VBITS
    KW: tl.constexpr = KGROUP * KLOW // 16
    VW: tl.constexpr = VGROUP * VLOW // 16
    KPLANES: tl.constexpr = 16 // KLOW
    VPLANES: tl.constexpr = 16 // VLOW
    KHIGH: tl.constexpr = 16 if KBITS == 3 else 0
    VHIGH: tl.constexpr = 16 if VBITS == 3 else 0
    rows, tokens = tl.arange(0, M), tl.arange(0, N)
    kword, vword, bword = tl.arange(0, KWP), tl.arange(0, VWP), tl.arange(0, 16)
    CHANNELS: tl.constexpr = KG * KGROUP
    WIDTH: tl.constexpr = CHANNELS + 2 * PAIRS
    row_ptr = rotated_ptr + ((batch * units + unit) * R + rows).to(tl.int64) * WIDTH
    inside = rows < R

    # Tiles start at multiples of N, so that scales are read in pairs.
    skipped = first // N
    tiles = tl.cdiv(tl.cdiv(last, N) - skipped, splits)
    start = (skipped + split * tiles) * N
    stop = tl.minimum(start + tiles * N, last)
    key_rows = ((batch * units + unit) * KG).to(tl.int64) * capacity
    value_rows = ((batch * units + unit) * VG).to(tl.int64) * capacity
    key_codes += key_rows * KWORDS
    key_scale += key_rows
    key_offset += key_rows
    value_codes += value_rows * VWORDS
    value_scale += value_rows
    value_offset += value_rows
    mask_ptr += batch.to(tl.int64) * mask_stride
    if PAIRS > 0:
        pair = tl.arange(0, PAIRS)
        angles = tl.load(angle_ptr + pair)
        table = table_ptr + tokens[:, None] * (2 * PAIRS) + pair[None, :]
        table_cos, table_sin = tl.load(table), tl.load(table + PAIRS)
        cos, sin = cos_sin((position + start).to(tl.float64) * angles)
        cos, sin = cos[:, None], sin[:, None]
        turn_cos, turn_sin = cos_sin(N * angles)
        turn_cos, turn_sin = turn_cos[:, None], turn_sin[:, None]
    if DEPENDENT:
        if not WRAPS:
            ahead = tl.minimum(start + tl.arange(0, 2 * N), capacity - 1)
            _prefetch(key_codes + ahead.to(tl.int64) * KWORDS)
            _prefetch(value_codes + ahead.to(tl.int64) * VWORDS)
        gdc_wait()  # for what `step_kernel` writes: rotated queries, the ring, codes if there is no window
    coming = _token_data(
        start, first, stop, key_scale, key_offset, value_scale, value_offset, mask_ptr, mask_offset,
        mask_columns, capacity, KG, VG, N, WRAPS, MASKED,
    )  # fmt: skip
    if PAIRS > 0:
        from_cos = tl.load(row_ptr[None, :] + CHANNELS + pair[:, None], mask=inside[None, :], other=0.0)
        from_sin = tl.load(
            row_ptr[None, :] + CHANNELS + PAIRS + pair[:, None], mask=inside[None, :], other=0.0
        )
    channel = tl.arange(0, CP)
    whole = tl.load(
        row_ptr[:, None] + channel[None, :], mask=inside[:, None] & (channel < CHANNELS)[None, :], other=0.0
    )
    planes = ()
    for g in tl.static_range(KG):
        keep = (kword < KW)[:, None] & inside[None, :]
        for plane in tl.static_range(KPLANES):
            planes = planes + (_query_plane(row_ptr + g * KGROUP, keep, kword, plane, KLOW, KGROUP),)
        for plane in tl.static_range(KHIGH):
            keep_high = (bword < KGROUP // 16)[:, None] & inside[None, :]
            planes = planes + (4.0 * _query_plane(row_ptr + g * KGROUP, keep_high, bword, plane, 1, KGROUP),)

    tl.debug_barrier()  # so that all loads are under way before the first is waited for

    # The unit's largest |query channel| is brought to 2^12, so that no plane leaves fp16's normal range.
    largest = tl.maximum(tl.max(tl.max(tl.abs(whole), 1), 0), 1.0e-30)
    top = 4096.0 / largest
    unscale = largest * (_CODE_UNIT / 4096.0)
    queries = ()
    sums = ()
    for g in tl.static_range(KG):
        of_group = (channel >= g * KGROUP) & (channel < (g + 1) * KGROUP)
        sums = sums + (tl.sum(tl.where(of_group[None, :], whole, 0.0), 1),)
    for i in tl.static_range(KG * (KPLANES + KHIGH)):
        queries = queries + ((planes[i] * top).to(tl.float16),)
    if PAIRS > 0:
        by_cos, by_sin = from_cos * cos + from_sin * sin, from_sin * cos - from_cos * sin
    accumulators = ()
    for g in tl.static_range(VG):
        for plane in tl.static_range(VPLANES):
            accumulators = accumulators + (tl.zeros([VWP, M], tl.float32),)
        for plane in tl.static_range(VHIGH):
            accumulators = accumulators + (tl.zeros([16, M], tl.float32),)
    # Sums over tokens, one for each of 16 residues: the rest of the sum is taken once, at the end.
    offsets = ()
    for g in tl.static_range(VG):
        offsets = offsets + (tl.zeros([16, M], tl.float32),)
    total = tl.zeros([16, M], tl.float32)
    highest = tl.full([M], _LOWEST, tl.float32)

    for n0 in tl.range(start, stop, N, num_stages=STAGES):
        data = coming
        held = n0 + tokens < stop
        origin = tl.cast(n0, tl.int64)
        slot = tokens
        if WRAPS:
            origin = origin * 0
            slot = (n0 + tokens) % capacity
        seen = data[0].to(tl.float32) > 0.0
        if MASKED:
            seen = seen & (data[2 * (KG + VG)] != 0)
        # A token's weight has its largest value scale in it: fp16 holds the product, whatever the scale.
        widest = _shown(data[2 * KG], seen, 1.0, MASKED)
        for g in tl.static_range(1, VG):
            widest = tl.maximum(widest, _shown(data[2 * (KG + g)], seen, 1.0, MASKED))
        raised = tl.where(seen, _fast_log2(widest), _HIDDEN)
        lowered = _fast_inverse(widest)
        scores = tl.zeros([N, M], tl.float32)
        if PAIRS > 0:
            scores = tl.dot(table_cos, by_cos.to(tl.float16), scores)
            scores = tl.dot(table_sin, by_sin.to(tl.float16), scores)
            by_cos, by_sin = by_cos * turn_cos + by_sin * turn_sin, by_sin * turn_cos - by_cos * turn_sin
        for g in tl.static_range(KG):
            at = key_codes + (g * tl.cast(capacity, tl.int64) + origin) * KWORDS
            words = tl.load(
                at + slot[:, None] * KWORDS + kword[None, :],
                mask=held[:, None] & (kword < KW)[None, :] if KW < KWP else held[:, None], other=0,
            )  # fmt: skip
            scale = tl.abs(_shown(data[2 * g], seen, 0.0, MASKED))
            shift = _shown(data[2 * g + 1], seen, 0.0, MASKED)
            if not MIDPOINT:
                shift = -scale * shift
            product = tl.zeros([N, M], tl.float32)
            for plane in tl.static_range(KPLANES):
                product = tl.dot(
                    code_plane(words, plane, KLOW), queries[g * (KPLANES + KHIGH) + plane], product
                )
            if KBITS == 3:
                words = tl.load(
                    at + slot[:, None] * KWORDS + KW + bword[None, :],
                    mask=held[:, None] & (bword < KGROUP // 16)[None, :], other=0,
                )  # fmt: skip
                for plane in tl.static_range(KHIGH):
                    product = tl.dot(
                        code_plane(words, plane, 1), queries[g * (KPLANES + KHIGH) + KPLANES + plane], product
                    )
            scores = shift[:, None] * sums[g][None, :] + scores
            scores = product * (scale * unscale)[:, None] + scores
        scores = _capped(scores, softcap, SOFTCAP) + raised[:, None]
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        fade = tl.exp2(highest - new_highest)[None, :]
        weights = tl.exp2(scores - (new_highest - _WEIGHT_BITS)[None, :])
        highest = new_highest
        total = total * fade + _by_residue(weights * lowered[:, None], N, M)
        coming = _token_data(
            n0 + N, first, stop, key_scale, key_offset, value_scale, value_offset, mask_ptr, mask_offset,
            mask_columns, capacity, KG, VG, N, WRAPS, MASKED,
        )  # fmt: skip
        new_accumulators = ()
        new_offsets = ()
        for g in tl.static_range(VG):
            at = value_codes + (g * tl.cast(capacity, tl.int64) + origin) * VWORDS
            words = tl.load(
                at + slot[None, :] * VWORDS + vword[:, None],
                mask=held[None, :] & (vword < VW)[:, None] if VW < VWP else held[None, :], other=0,
            )  # fmt: skip
            share = _shown(data[2 * (KG + g)], seen, 0.0, MASKED) * lowered
            offset = _shown(data[2 * (KG + g) + 1], seen, 0.0, MASKED)
            offset = offset * lowered if MIDPOINT else -share * offset
            new_offsets = new_offsets + (offsets[g] * fade + _by_residue(weights * offset[:, None], N, M),)
            scaled = weights if VG == 1 else weights * share[:, None]
            scaled = scaled.to(tl.float16)
            for plane in tl.static_range(VPLANES):
                before = accumulators[g * (VPLANES + VHIGH) + plane] * fade
                new_accumulators = new_accumulators + (
                    tl.dot(code_plane(words, plane, VLOW), scaled, before),
                )
            if VBITS == 3:
                words = tl.load(
                    at + slot[None, :] * VWORDS + VW + bword[:, None],
                    mask=held[None, :] & (bword < VGROUP // 16)[:, None], other=0,
                )  # fmt: skip
                for plane in tl.static_range(VHIGH):
                    before = accumulators[g * (VPLANES + VHIGH) + VPLANES + plane] * fade
                    new_accumulators = new_accumulators + (
                        tl.dot(code_plane(words, plane, 1), scaled, before),
                    )
        accumulators = new_accumulators
        offsets = new_offsets

    part = part * R + rows
    tl.store(weight_ptr + part * 2, highest - _WEIGHT_BITS, mask=inside)
    tl.store(weight_ptr + part * 2 + 1, tl.sum(total, 0), mask=inside)
    own = rows // REPEATS * DV  # first channel of a row's own head in its unit
    for g in tl.static_range(VG):
        for plane in tl.static_range(VPLANES):
            values = accumulators[g * (VPLANES + VHIGH) + plane] * (_CODE_UNIT * plane_factor(plane, VLOW))
            to = g * VGROUP + plane_channels(vword, plane, VLOW, VGROUP)[:, None] - own[None, :]
            keep = (to >= 0) & (to < DV) & (vword < VW)[:, None] & inside[None, :]
            tl.store(out_ptr + part[None, :] * DV + to, values + tl.sum(offsets[g], 0)[None, :], mask=keep)
    if VBITS == 3:
        tl.debug_barrier()  # other threads stored the low bits' share of a channel
        for g in tl.static_range(VG):
            for plane in tl.static_range(VHIGH):
                values = accumulators[g * (VPLANES + VHIGH) + VPLANES + plane]
                to = g * VGROUP + plane_channels(bword, plane, 1, VGROUP)[:, None] - own[None, :]
                keep = (to >= 0) & (to < DV) & (bword < VGROUP // 16)[:, None] & inside[None, :]
                at = out_ptr + part[None, :] * DV + to
                values = tl.load(at, mask=keep, other=0.0) + values * (
                    4.0 * _CODE_UNIT * plane_factor(plane, 1)
                )
                tl.store(at, values, mask=keep)


@triton.jit
def _exact(
    batch, unit, tile, part, newest, earliest,
    query_ptr, recent_keys, recent_values, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    scale, softcap, units, ring, out_ptr, weight_ptr,
    R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, NE: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Weights and values of one tile of sinks that left the window, or of the window's tokens."""
    rows, tokens = tl.arange(0, M), tl.arange(0, NE)
    channel, value_channel = tl.arange(0, DP), tl.arange(0, DVP)
    inside = rows < R
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    SINK_TILES: tl.constexpr = (SINKS + NE - 1) // NE
    index = tokens + (tile - SINK_TILES) * NE
    number = newest - WINDOW + 1 + index
    seen = (number >= earliest) & (number >= 0) & (index < WINDOW)
    keys, values, rows_held, slot = recent_keys, recent_values, ring, number % ring
    if SINKS > 0:  # noqa: SIM102, a constant and a runtime condition
        if tile < SINK_TILES:
            index = tokens + tile * NE
            number = tl.load(sink_tokens + batch.to(tl.int64) * SINKS + index, mask=index < SINKS, other=-1)
            seen = (number >= earliest) & (number >= 0) & (number <= newest - WINDOW)
            keys, values, rows_held, slot = sink_keys, sink_values, SINKS, index
    if MASKED:
        column = number - mask_offset
        known = seen & (column >= 0) & (column < mask_columns)  # columns without a word are hidden
        seen = tl.load(mask_ptr + batch.to(tl.int64) * mask_stride + column, mask=known, other=0) != 0
    key_words = ()
    value_words = ()
    queries = ()
    for u in tl.static_range(U):
        head = ((batch * units + unit) * U + u).to(tl.int64) * rows_held
        own = inside & (rows // REPEATS == u)
        key_words = key_words + (
            tl.load(
                keys + head * D + slot[:, None] * D + channel[None, :],
                mask=seen[:, None] & (channel < D)[None, :], other=0.0,
            ),
        )  # fmt: skip
        value_words = value_words + (
            tl.load(
                values + head * DV + slot[None, :] * DV + value_channel[:, None],
                mask=seen[None, :] & (value_channel < DV)[:, None], other=0.0,
            ),
        )  # fmt: skip
        queries = queries + (
            tl.load(
                query_ptr + row[None, :] * D + channel[:, None],
                mask=own[None, :] & (channel < D)[:, None], other=0.0,
            ),
        )  # fmt: skip
    tl.debug_barrier()  # so that all loads are under way before the first is waited for
    scores = tl.zeros([NE, M], tl.float32)
    for u in tl.static_range(U):
        if query_ptr.dtype.element_ty == recent_keys.dtype.element_ty and not _INTERPRETED:
            scores = tl.dot(key_words[u], queries[u], scores)
        else:
            scores = _split_dot(key_words[u], queries[u].to(tl.float32), scores)
    scores = _capped(scores * (scale * _LOG2E), softcap, SOFTCAP)
    scores = tl.where(seen[:, None], scores, _HIDDEN)
    highest = tl.maximum(tl.max(scores, 0), _LOWEST)
    weights = tl.exp2(scores - highest[None, :])
    part = part * R + rows
    tl.store(weight_ptr + part * 2, highest, mask=inside)
    tl.store(weight_ptr + part * 2 + 1, tl.sum(weights, 0), mask=inside)
    for u in tl.static_range(U):
        own = inside & (rows // REPEATS == u)
        result = _split_dot(value_words[u], weights, tl.zeros([DVP, M], tl.float32))
        tl.store(
            out_ptr + part[None, :] * DV + value_channel[:, None], result,
            mask=own[None, :] & (value_channel < DV)[:, None],
        )  # fmt: skip


@triton.jit(do_not_specialize=["number", "mask_offset", "mask_columns", "mask_stride"])
def decode_kernel(
    count_ptr, number, query_ptr, rotated_ptr,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    position_ptr, position_stride, angle_ptr, table_ptr,
    scale, softcap, units, out_ptr, weight_ptr,
    COUNTED: tl.constexpr, R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    KG: tl.constexpr, VG: tl.constexpr, KGROUP: tl.constexpr, VGROUP: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KWORDS: tl.constexpr, VWORDS: tl.constexpr,
    KWP: tl.constexpr, VWP: tl.constexpr, CP: tl.constexpr,
    PAIRS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, SLIDING: tl.constexpr,
    N: tl.constexpr, NE: tl.constexpr, STAGES: tl.constexpr, MIDPOINT: tl.constexpr,
    WRAPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (B * units, splits + tiles): shares of the history first, then tiles of exact tokens.

    `number` is the new token's (read from `count_ptr` where COUNTED). out fp32 [B, units, parts, R, DV],
    weights fp32 [B, units, parts, R, 2]: each part's base, in units of log 2, and its sum of weights.
    """
    EXACT: tl.constexpr = (SINKS + NE - 1) // NE + (WINDOW + NE - 1) // NE
    if DEPENDENT:
        gdc_launch_dependents()
    newest = number
    if COUNTED:
        newest = tl.load(count_ptr).to(tl.int32)
    batch, unit = tl.program_id(0) // units, tl.program_id(0) % units
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    earliest = newest * 0
    if SLIDING > 0:
        earliest = tl.maximum(newest - SLIDING + 1, 0)
    split, splits = tl.program_id(1), tl.num_programs(1) - EXACT
    if split < splits:
        position = newest * 0
        if PAIRS > 0:
            position = tl.load(position_ptr + batch * position_stride).to(tl.int32) - newest
        _history(
            batch, unit, split, splits, part,
            earliest, tl.maximum(newest + 1 - WINDOW, earliest),
            rotated_ptr, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset,
            mask_ptr, mask_stride, mask_offset, mask_columns,
            position, angle_ptr, table_ptr, softcap, capacity, units, out_ptr, weight_ptr,
            R, M, U, REPEATS, DV, KG, VG, KGROUP, VGROUP, KBITS, VBITS, KWORDS, VWORDS, KWP, VWP, CP,
            PAIRS, N, STAGES, MIDPOINT, WRAPS, MASKED, SOFTCAP, DEPENDENT,
        )  # fmt: skip
    else:
        if DEPENDENT:
            gdc_wait()
        _exact(
            batch, unit, split - splits, part, newest, earliest,
            query_ptr, recent_keys, recent_values, sink_keys, sink_values, sink_tokens,
            mask_ptr, mask_stride, mask_offset, mask_columns,
            scale, softcap, units, ring, out_ptr, weight_ptr,
            R, M, U, REPEATS, D, DV, DP, DVP, SINKS, WINDOW, NE, MASKED, SOFTCAP,
        )  # fmt: skip


@triton.jit
def _combine(
    row, first_channel, part_ptr, weight_ptr, sink_logits, out_ptr, parts, rows,
    DV: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some channels of one query row, of parts [parts, DV]. A sink logit (one a query head) joins the
    denominator.
    """
    first = ((row // rows).to(tl.int64) * parts) * rows + row % rows
    channel, block = first_channel + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    top, total = tl.full([], _LOWEST, tl.float32), tl.full([], 0.0, tl.float32)
    if HAS_LOGITS:
        top, total = tl.load(sink_logits + row % HAS_LOGITS).to(tl.float32) * _LOG2E, total + 1.0
    result = tl.zeros([COLUMNS], tl.float32)
    for p0 in range(0, parts, BLOCK):
        at = first + (p0 + block) * rows
        inside = p0 + block < parts
        values = tl.load(
            part_ptr + at[:, None] * DV + channel[None, :],
            mask=inside[:, None] & (channel < DV)[None, :], other=0.0,
        )  # fmt: skip
        tl.debug_barrier()  # or the compiler waits for the first load before it issues the last
        highest = tl.load(weight_ptr + at * 2, mask=inside, other=_HIDDEN)
        part_total = tl.load(weight_ptr + at * 2 + 1, mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(highest, 0))
        weight = tl.exp2(highest - new_top)
        fade = tl.exp2(top - new_top)
        top = new_top
        total = total * fade + tl.sum(weight * part_total, 0)
        result = result * fade + tl.sum(weight[:, None] * values, 0)
    result = result / tl.where(total > 0.0, total, 1.0)
    tl.store(
        out_ptr + row.to(tl.int64) * DV + channel, result.to(out_ptr.dtype.element_ty), mask=channel < DV
    )


@triton.jit(do_not_specialize=["number", "parts", "tokens", "rows_total", "new_tokens"])
def finish_kernel(
    count_ptr, number, quantize_programs, part_ptr, weight_ptr, sink_logits, out_ptr, parts, rows,
    key_programs, row_blocks, tokens, rows_total, new_tokens,
    new_keys, new_values, ring_keys, ring_values, ring, sink_tokens,
    key_matrix, key_mean, angle_ptr, position_ptr, position_stride,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    key_clip, value_clip, units,
    COUNTED: tl.constexpr, QUANTIZES: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, U: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KGROUP: tl.constexpr, VGROUP: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KBYTES: tl.constexpr, VBYTES: tl.constexpr, KWIDTH: tl.constexpr, VWIDTH: tl.constexpr,
    PAIRS: tl.constexpr, SINKS: tl.constexpr, SINKS_PADDED: tl.constexpr, MIDPOINT: tl.constexpr,
    WRAPS: tl.constexpr, LAG: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: programs that quantize, where it QUANTIZES, which wait for nothing; then B * units * rows times
    DV / COLUMNS programs that combine.
    """
    program = tl.program_id(0)
    if QUANTIZES:  # noqa: SIM102, a constant and a runtime condition
        if program < quantize_programs:
            start = number
            if COUNTED:
                start = tl.load(count_ptr).to(tl.int32)
            quantize_program(
                program, start, key_programs, row_blocks, tokens, rows_total, new_tokens,
                new_keys, new_values, ring_keys, ring_values, ring, sink_tokens,
                key_matrix, key_mean, angle_ptr, position_ptr, position_stride,
                key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
                key_clip, value_clip, units, D, DV, DP, U, KG, VG, KGROUP, VGROUP, KBITS, VBITS, KBYTES,
                VBYTES, KWIDTH, VWIDTH, PAIRS, SINKS, SINKS_PADDED, MIDPOINT, WRAPS, LAG, ROWS,
            )  # fmt: skip
    program -= quantize_programs
    if program >= 0:
        if DEPENDENT:
            gdc_wait()
        tiles: tl.constexpr = (DV + COLUMNS - 1) // COLUMNS
        _combine(
            program // tiles, program % tiles * COLUMNS, part_ptr, weight_ptr, sink_logits, out_ptr, parts,
            rows, DV, HAS_LOGITS, BLOCK, COLUMNS,
        )  # fmt: skip


def decode(
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
    """The op `rotatekv::decode` (`rotatekv_fx.ops` describes it), in three launches."""
    batch, query_heads, _, dim = query.shape
    value_dim = value.shape[3]
    query, key, value = (x.contiguous() for x in (query, key, value))
    mask = None if mask is None else mask.contiguous()
    history, sinks, position, window = held.history, held.sinks, held.position, held.window
    counter = position if held.count is None else held.count
    _, _, rotation, angles, table = held.key_map
    width = rotation.shape[2]
    rotated = query.new_empty((batch, query_heads, width), dtype=torch.float32)
    dependent = tuning.dependent_launch(query.device)
    launch = {"launch_pdl": True} if dependent else {}
    codes = quantizing(key, value, held)
    before, after = (0, codes.programs) if window else (codes.programs, 0)
    launch_step(
        codes, held, 1 if held.recent else 0, before, query, rotated, scale * math.log2(math.e), dependent
    )
    units, unit_heads = held.units, held.unit_heads(key)
    key_groups, value_groups = held.unit_groups(key, value)
    repeats = query_heads // key.shape[1]
    rows = unit_heads * repeats
    sink_count = sinks[2].shape[1] if sinks else 0
    exact_tile = 32 if unit_heads == 1 and dim <= 128 else 16
    exact_tiles = triton.cdiv(sink_count, exact_tile) + triton.cdiv(window, exact_tile)
    channels = max(key_groups * held.key_group, value_groups * held.value_group)
    choice = tuning.decode_choice(query.device, batch * units, held.capacity, rows, channels, exact_tiles)
    count_parts = choice.splits + exact_tiles
    parts = query.new_empty((batch * units, count_parts, rows, value_dim), dtype=torch.float32)
    weights = query.new_empty((batch * units, count_parts, rows, 2), dtype=torch.float32)
    out = query.new_empty((batch, 1, query_heads, value_dim))
    recent_keys, recent_values = held.recent or (key, value)
    sink_keys, sink_values, sink_tokens = sinks or (recent_keys, recent_values, position)
    shown = position if mask is None else mask.view(torch.int8)
    key_words = history[0].shape[3] // 2
    value_words = history[3].shape[3] // 2
    decode_kernel[(batch * units, count_parts)](
        counter, held.number, query, rotated,
        history[0].view(torch.int16), history[1], history[2],
        history[3].view(torch.int16), history[4], history[5], held.capacity,
        recent_keys, recent_values, recent_keys.shape[2], sink_keys, sink_values, sink_tokens,
        shown, 0 if mask is None or mask.shape[0] == 1 else mask.stride(0), mask_offset,
        0 if mask is None else mask.shape[1],
        position, 0 if position.shape[0] == 1 else 1, angles, table,
        scale, softcap, units, parts, weights,
        COUNTED=held.count is not None, R=rows, M=max(8, triton.next_power_of_2(rows)),
        U=unit_heads, REPEATS=repeats,
        D=dim, DV=value_dim, DP=triton.next_power_of_2(dim), DVP=triton.next_power_of_2(value_dim),
        KG=key_groups, VG=value_groups, KGROUP=held.key_group, VGROUP=held.value_group,
        KBITS=held.key_bits, VBITS=held.value_bits, KWORDS=key_words, VWORDS=value_words,
        KWP=_tensor_step(held.key_group, held.key_bits), VWP=_tensor_step(held.value_group, held.value_bits),
        CP=triton.next_power_of_2(key_groups * held.key_group), PAIRS=len(angles), SINKS=sink_count,
        WINDOW=window, SLIDING=sliding, N=choice.tile, NE=exact_tile, STAGES=choice.stages,
        MIDPOINT=held.scheme == "midpoint", WRAPS=held.wraps, MASKED=mask is not None, SOFTCAP=softcap != 0.0,
        DEPENDENT=dependent, num_warps=1, num_stages=choice.stages, **launch,
    )  # fmt: skip
    block, columns = tuning.combine_block(count_parts, value_dim)
    finish_kernel[(after + batch * query_heads * triton.cdiv(value_dim, columns),)](
        counter, held.number, after, parts, weights,
        weights if sink_logits is None else sink_logits, out, count_parts, rows, *codes.arguments,
        COUNTED=held.count is not None, QUANTIZES=after > 0,
        HAS_LOGITS=0 if sink_logits is None else query_heads, BLOCK=block, COLUMNS=columns,
        DEPENDENT=dependent, **codes.constants, num_warps=tuning.step_warps(codes.rows), maxnreg=128,
        **launch,
    )  # fmt: skip
    return out


def _tensor_step(group: int, bits: int) -> int:
    """Words of a group's codes (of the 2-bit plane at 3 bits), padded to a tensor-core step of 16."""
    return max(16, triton.next_power_of_2(group * (2 if bits == 3 else bits) // 16))
