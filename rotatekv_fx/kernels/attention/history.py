"""Decode attention over packed history: one share of the tokens, by a program of one warp.

The inverse rotation of the keys is applied to the query once, so codes enter the products as they are, and a
group's scale and offset are applied to its scores. The mean's share of a score is a sum of cosines and sines
of the token's position. Within a tile of consecutive tokens that is the product of a fixed table, cos(j t)
and sin(j t), with coefficients that turn by a fixed angle from tile to tile: nothing is read for it.

Codes are never converted: tensor cores multiply them as subnormal numbers (`quantize/planes.py`).

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
from rotatekv_fx.kernels.quantize.planes import (
    CODE_UNIT,
    code_plane,
    in_words,
    plane_channels,
    plane_factor,
    wave_width,
    word_at,
)
from rotatekv_fx.kernels.quantize.programs import cos_sin

_WEIGHT_BITS = tl.constexpr(14.0)  # log 2 of the largest fp16 weight


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
    plane_ptr, wave_ptr, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    position, angle_ptr, table_ptr, softcap, capacity, columns, units, out_ptr, weight_ptr,
    R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr, DV: tl.constexpr,
    KG: tl.constexpr, VG: tl.constexpr, KGROUP: tl.constexpr, VGROUP: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KWORDS: tl.constexpr, VWORDS: tl.constexpr,
    KWP: tl.constexpr, VWP: tl.constexpr, PLACES: tl.constexpr,
    PAIRS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, MIDPOINT: tl.constexpr,
    WRAPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Weights and values of one share of the history.

    `columns` is 0, or what a row has of scores that are made already: `wave_ptr` then points at them, and
    there are no key groups (KG is 0). Where the launch is DEPENDENT, rotated queries are waited for; and so
    are codes, unless they were made EARLY, in a step before.
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
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    plane_ptr += row[None, :] * (KG * PLACES)
    wave_ptr += row * (wave_width(PAIRS) if KG > 0 else columns)
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
        waves = wave_ptr[None, :] + pair[:, None]
        from_cos = tl.load(waves, mask=inside[None, :], other=0.0, volatile=True)
        from_sin = tl.load(waves + PAIRS, mask=inside[None, :], other=0.0, volatile=True)
    if KG > 0:
        unscale = tl.load(wave_ptr + 2 * PAIRS, mask=inside, other=0.0)
    queries = ()
    place, place_high = tl.arange(0, KWP)[:, None], tl.arange(0, 16)[:, None]
    keep, keep_high = inside[None, :], inside[None, :]
    if KW < KWP:
        keep = keep & (word_at(place, KWP) < KW)
    if KGROUP < 256:
        keep_high = keep_high & (word_at(place_high, 16) < KGROUP // 16)
    for g in tl.static_range(KG):
        group_ptr = plane_ptr + g * PLACES
        for plane in tl.static_range(KPLANES):
            x = tl.load(group_ptr + (plane * KWP + place), mask=keep, other=0.0, volatile=True)
            queries = queries + (in_words(x, KWP, M),)
        for plane in tl.static_range(KHIGH):
            high_ptr = group_ptr + (KPLANES * KWP + plane * 16)
            x = tl.load(high_ptr + place_high, mask=keep_high, other=0.0, volatile=True)
            queries = queries + (in_words(x, 16, M),)
    sums = ()
    for g in tl.static_range(KG):
        by_word = tl.zeros([KWP, M], tl.float32)
        for plane in tl.static_range(KPLANES):
            x = queries[g * (KPLANES + KHIGH) + plane].to(tl.float32)
            by_word += x * (1.0 / plane_factor(plane, KLOW))
        sums = sums + (tl.sum(by_word, 0),)
    if PAIRS > 0:
        from_cos, from_sin = from_cos * unscale[None, :], from_sin * unscale[None, :]
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
                wave_ptr[None, :] + (origin + slot)[:, None],
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
            product = product * (scale * CODE_UNIT)[:, None] + shift[:, None] * sums[g][None, :]
            scores = product * unscale[None, :] + scores
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
            values = accumulators[g * (VPLANES + VHIGH) + plane] * (CODE_UNIT * plane_factor(plane, VLOW))
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
                    4.0 * CODE_UNIT * plane_factor(plane, 1)
                )
                tl.store(at, values, mask=keep)
