"""Decode attention over packed history: one share of the tokens, by a program of one warp.

The inverse rotation of the keys is applied to the query once, so codes enter the products as they are, and a
group's scale and offset are applied to its scores. The mean's share of a score is a sum of cosines and sines
of the token's position. Within a tile of consecutive tokens that is the product of a fixed table, cos(j t)
and sin(j t), with coefficients that turn by a fixed angle from tile to tile: nothing is read for it.

Codes are never converted. Words of 16 bits are masked, and what is left is read as a subnormal fp16 number,
code * 2^(bit - 24), which tensor cores multiply exactly; 2^-bit goes to the query's channel and to the
output's, 2^24 to the scales.

A token's value scale is part of its weight, as its logarithm in the score: fp16 then holds the weights of any
scale, and the sums of weights and offsets divide it out again. Scales are read a tile ahead of their use.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from rotatekv_fx.kernels.attention.scores import (
    HIDDEN,
    INTERPRETED,
    LOG2E,
    LOWEST,
    capped,
    mask_words,
    prefetch,
    shows,
)
from rotatekv_fx.kernels.quantize.programs import cos_sin

_CODE_UNIT = tl.constexpr(16777216.0)  # 2^24, the inverse of the fp16 subnormal 1
_WEIGHT_BITS = tl.constexpr(14.0)  # log 2 of the largest fp16 weight


@triton.jit
def masked_bits(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """(words >> SHIFT) & MASK of int16 words, read as fp16. On a GPU two words at a time; bits that the
    shift brings over from the neighbour are masked away.
    """
    mask = tl.full(words.shape, MASK, tl.int16)
    if INTERPRETED:
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
def _shown(x, seen, other, MASKED: tl.constexpr):
    """Tokens' numbers in fp32; those of masked tokens, which may be NaN, replaced."""
    x = x.to(tl.float32)
    return tl.where(seen, x, other) if MASKED else x


@triton.jit
def _fast_log2(x):
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _fast_inverse(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _by_residue(x, N: tl.constexpr, M: tl.constexpr):
    """x [N, M] summed to [16, M]: a tensor-core tile's rows are in registers of one thread."""
    return tl.sum(tl.reshape(x, [N // 16, 16, M]), 0)


@triton.jit
def _token_data(
    n0, first, stop, key_scale, key_offset, value_scale, value_offset,
    mask_ptr, mask_offset, mask_columns, capacity,
    KG: tl.constexpr, VG: tl.constexpr, N: tl.constexpr, WRAPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scales and offsets of a tile's tokens, group by group, and what the mask says of them."""
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
        data = data + (mask_words(mask_ptr, number, held, mask_offset, mask_columns, MASKED),)
    return data


@triton.jit
def attend_history(
    batch, unit, split, splits, part, first, last,
    rotated_ptr, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    position, angle_ptr, table_ptr, softcap, capacity, columns, units, out_ptr, weight_ptr,
    R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr, DV: tl.constexpr,
    KG: tl.constexpr, VG: tl.constexpr, KGROUP: tl.constexpr, VGROUP: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KWORDS: tl.constexpr, VWORDS: tl.constexpr,
    KWP: tl.constexpr, VWP: tl.constexpr,
    PAIRS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, MIDPOINT: tl.constexpr,
    WRAPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Weights and values of one share of the history.

    `columns` is 0, or what a row has of scores that are made already: `rotated_ptr` then points at them, and
    there are no key groups (KG is 0).
    """
    # Words of a group, padded to a tensor-core step; 3-bit codes are a 2-bit plane and a 1-bit plane.
    KLOW: tl.constexpr = 2 if KBITS == 3 else KBITS
    VLOW: tl.constexpr = 2 if VBITS == 3 else VBITS
    KW: tl.constexpr = KGROUP * KLOW // 16
    VW: tl.constexpr = VGROUP * VLOW // 16
    KPLANES: tl.constexpr = 16 // KLOW
    VPLANES: tl.constexpr = 16 // VLOW
    KHIGH: tl.constexpr = 16 if KBITS == 3 else 0
    # Scores that are made already are hidden already, but have nothing added.
    READ: tl.constexpr = 0 if KG == 0 and MASKED == 1 else MASKED
    VHIGH: tl.constexpr = 16 if VBITS == 3 else 0
    rows, tokens = tl.arange(0, M), tl.arange(0, N)
    kword, vword, bword = tl.arange(0, KWP), tl.arange(0, VWP), tl.arange(0, 16)
    CHANNELS: tl.constexpr = KG * KGROUP
    WIDTH: tl.constexpr = CHANNELS + 2 * PAIRS
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    row_ptr = rotated_ptr + row * (WIDTH if KG > 0 else columns)
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
            prefetch(key_codes + ahead.to(tl.int64) * KWORDS)
            prefetch(value_codes + ahead.to(tl.int64) * VWORDS)
        if not EARLY:
            gdc_wait()  # `step_kernel` writes codes too
    coming = _token_data(
        start, first, stop, key_scale, key_offset, value_scale, value_offset, mask_ptr, mask_offset,
        mask_columns, capacity, KG, VG, N, WRAPS, READ,
    )  # fmt: skip
    if DEPENDENT and EARLY:
        gdc_wait()
    # Volatile loads are issued in this order, before the first is waited for; others need not be.
    if PAIRS > 0:
        waves = row_ptr[None, :] + CHANNELS + pair[:, None]
        from_cos = tl.load(waves, mask=inside[None, :], other=0.0, volatile=True)
        from_sin = tl.load(waves + PAIRS, mask=inside[None, :], other=0.0, volatile=True)
    planes = ()
    keep = (kword < KW)[:, None] & inside[None, :]
    keep_high = (bword < KGROUP // 16)[:, None] & inside[None, :]
    for g in tl.static_range(KG):
        of_group = row_ptr[None, :] + g * KGROUP
        for plane in tl.static_range(KPLANES):
            channel = plane_channels(kword, plane, KLOW, KGROUP)
            x = tl.load(of_group + channel[:, None], mask=keep, other=0.0, volatile=True)
            planes = planes + (x,)
        for plane in tl.static_range(KHIGH):
            channel = plane_channels(bword, plane, 1, KGROUP)
            x = tl.load(of_group + channel[:, None], mask=keep_high, other=0.0, volatile=True)
            planes = planes + (x,)

    tl.debug_barrier()  # so that all loads are under way before the first is waited for

    # The unit's largest |query channel| is brought to 2^12, so that no plane leaves fp16's normal range.
    reach = tl.full([KWP, M], 1.0e-30, tl.float32)
    sums = ()
    for g in tl.static_range(KG):
        by_word = tl.zeros([KWP, M], tl.float32)
        for plane in tl.static_range(KPLANES):
            reach = tl.maximum(reach, tl.abs(planes[g * (KPLANES + KHIGH) + plane]))
            by_word += planes[g * (KPLANES + KHIGH) + plane]
        sums = sums + (tl.sum(by_word, 0),)
    largest = tl.max(tl.max(reach, 0), 0)
    top = 4096.0 / largest
    unscale = largest * (_CODE_UNIT / 4096.0)
    queries = ()
    for g in tl.static_range(KG):
        for plane in tl.static_range(KPLANES):
            factor = top * plane_factor(plane, KLOW)
            queries = queries + ((planes[g * (KPLANES + KHIGH) + plane] * factor).to(tl.float16),)
        for plane in tl.static_range(KHIGH):
            factor = top * (4.0 * plane_factor(plane, 1))
            queries = queries + ((planes[g * (KPLANES + KHIGH) + KPLANES + plane] * factor).to(tl.float16),)
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
    highest = tl.full([M], LOWEST, tl.float32)

    for n0 in tl.range(start, stop, N, num_stages=STAGES):
        data = coming
        held = n0 + tokens < stop
        origin = tl.cast(n0, tl.int64)
        slot = tokens
        if WRAPS:
            origin = origin * 0
            slot = (n0 + tokens) % capacity
        scores = tl.zeros([N, M], tl.float32)
        if KG == 0:
            scores = tl.load(
                row_ptr[None, :] + (origin + slot)[:, None],
                mask=(held & (n0 + tokens >= first))[:, None] & inside[None, :], other=HIDDEN,
            )  # fmt: skip
            seen = (tl.max(scores, 1) < LOWEST) == 0  # a bad token's scores are NaN, and seen
        else:
            seen = (data[0].to(tl.float32) < 0.0) == 0  # and so is its scale
            if MASKED:
                seen = seen & shows(data[2 * (KG + VG)], MASKED)
        # A token's weight has its largest value scale in it: fp16 holds the product, whatever the scale.
        widest = _shown(data[2 * KG], seen, 1.0, MASKED)
        for g in tl.static_range(1, VG):
            widest = tl.maximum(widest, _shown(data[2 * (KG + g)], seen, 1.0, MASKED))
        raised = _fast_log2(widest)
        if MASKED == 2:
            raised += data[2 * (KG + VG)].to(tl.float32) * LOG2E
        raised = tl.where(seen, raised, HIDDEN)
        lowered = _fast_inverse(widest)
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
        scores = capped(scores, softcap, SOFTCAP) + raised[:, None]
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        fade = tl.exp2(highest - new_highest)[None, :]
        weights = tl.exp2(scores - (new_highest - _WEIGHT_BITS)[None, :])
        highest = new_highest
        total = total * fade + _by_residue(weights * lowered[:, None], N, M)
        coming = _token_data(
            n0 + N, first, stop, key_scale, key_offset, value_scale, value_offset, mask_ptr, mask_offset,
            mask_columns, capacity, KG, VG, N, WRAPS, READ,
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
