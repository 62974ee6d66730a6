"""Programs that quantize: rows of a quantization group are gathered, transformed, rounded, packed and stored.

Rows of a tile are sequences in decode, and tokens in a prompt.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SCALE_MIN = tl.constexpr(6.103515625e-05)  # smallest normal fp16
_HALF_MAX = tl.constexpr(65504.0)
_ZERO_MAX = tl.constexpr(32767.0)


@triton.jit
def _round(x):
    """To the nearest whole number, halves to even."""
    if _INTERPRETED:
        return (x + 12582912.0) - 12582912.0  # exact for |x| < 2^22
    return libdevice.rint(x)


@triton.jit
def cos_sin(angle):
    """fp32 cosine and sine of a float64 angle, by Taylor series in a half turn around 0."""
    turns = angle * 0.15915494309189535
    halves = tl.floor(turns * 2.0 + 0.5)
    x = ((turns - halves * 0.5) * 6.283185307179586).to(tl.float32)
    odd = halves - 2.0 * tl.floor(halves * 0.5)
    sign = 1.0 - 2.0 * odd.to(tl.float32)
    y = x * x
    cos = -2.755731922398589e-07 + y * 2.08767569878681e-09
    cos = 1.0 + y * (-0.5 + y * (0.041666666666666664 + y * (-0.001388888888888889 + y * (
        2.48015873015873e-05 + y * cos))))  # fmt: skip
    sin = 2.7557319223985893e-06 - y * 2.505210838544172e-08
    sin = x * (1.0 + y * (-0.16666666666666666 + y * (0.008333333333333333 + y * (
        -0.0001984126984126984 + y * sin))))  # fmt: skip
    return cos * sign, sin * sign


@triton.jit
def _half_scale(scale):
    """The scale as it is stored, a normal fp16 number, in fp32."""
    return tl.minimum(tl.maximum(scale, _SCALE_MIN), _HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def as_stored(x, kind: tl.constexpr):
    """Exact numbers as a ring of this dtype holds them."""
    if kind == tl.float16:
        if x.dtype != tl.float16:
            x = x.to(tl.float32)
        x = tl.minimum(tl.maximum(x, -_HALF_MAX), _HALF_MAX)
    return x.to(kind)


@triton.jit
def _grid(y, real, BITS: tl.constexpr, clip, MIDPOINT: tl.constexpr):
    """Scale, offset and flatness [rows, 1] of a group y, fp32 [rows, channels] (formulas: op `quantize`)."""
    TOP: tl.constexpr = (1 << BITS) - 1
    bad = tl.max(tl.where((y != y) & real[None, :], 1, 0), 1)[:, None] > 0  # a NaN spoils its group
    high = tl.max(tl.where(real[None, :], y, -float("inf")), 1)[:, None]
    low = tl.min(tl.where(real[None, :], y, float("inf")), 1)[:, None]
    mid = tl.where(bad, float("nan"), (high + low) / 2)
    flat = bad | ((high > low) == 0)
    if MIDPOINT:
        reach = clip * (high - low) / 2
        scale = _half_scale(tl.div_rn(2.0 * reach, TOP))
        offset = tl.minimum(tl.maximum(mid - reach, -_HALF_MAX), _HALF_MAX).to(tl.float16).to(tl.float32)
    else:
        scale = _half_scale(tl.div_rn(clip * high - clip * low, TOP))
        offset = _round(tl.minimum(tl.maximum(tl.div_rn(-clip * low, scale), -1.0e6), 1.0e6))
        flat = flat | ((tl.abs(offset) <= _ZERO_MAX) == 0)
        scale = tl.where(flat, _half_scale(tl.abs(mid)), scale)
        sign = tl.where(mid > 0.5 * scale, 1.0, 0.0) - tl.where(mid < -0.5 * scale, 1.0, 0.0)
        offset = tl.where(flat, -sign, offset)
    return tl.where(bad, float("nan"), scale), offset, flat


@triton.jit
def _levels(y, scale, offset, flat, BITS: tl.constexpr, MIDPOINT: tl.constexpr):
    """Codes [rows, channels] in fp32, by the grids of the channels' groups."""
    TOP: tl.constexpr = (1 << BITS) - 1
    scale = tl.broadcast_to(scale, y.shape)
    if MIDPOINT:
        codes = _round(tl.div_rn(y - offset, scale))
    else:
        codes = _round(tl.div_rn(y, scale)) + offset
    return tl.where(flat, 0.0, tl.minimum(tl.maximum(codes, 0.0), TOP * 1.0))


@triton.jit
def _store_planes(
    codes, at, keep, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr
):
    """Store codes [ROWS, planes * WIDTH], plane-major, as bytes at `at` [ROWS]: one a column of WIDTH."""
    PLANES: tl.constexpr = 8 // BITS
    planes = tl.reshape(codes, [ROWS, PLANES, WIDTH])
    shifts = (tl.arange(0, PLANES) * BITS)[None, :, None]
    packed = tl.sum(planes << shifts, 1).to(tl.uint8)
    byte = tl.arange(0, WIDTH)
    tl.store(at[:, None] + byte[None, :], packed, mask=keep[:, None] & (byte < BYTES)[None, :])


@triton.jit
def product(x, matrix, y):
    """y + x @ matrix, for an fp32 matrix."""
    if x.dtype == tl.float32 or _INTERPRETED:
        return tl.dot(x.to(tl.float32), matrix, y, input_precision="tf32x3")
    high = matrix.to(x.dtype)  # and the matrix as the sum of two 16-bit ones
    low = (matrix - high.to(tl.float32)).to(x.dtype)
    return tl.dot(x, low, tl.dot(x, high, y))


@triton.jit
def _halves(x):
    """x as the sum of two fp16 numbers, for |x| below 65504."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def wave_product(x, matrix, y):
    """y + x @ matrix for fp32 cosines or sines x."""
    if _INTERPRETED:
        return tl.dot(x, matrix, y)
    high, low = _halves(x)
    matrix_high, matrix_low = _halves(matrix)
    return tl.dot(high, matrix_high, tl.dot(low, matrix_high, tl.dot(high, matrix_low, y)))


@triton.jit
def _rows_of(
    head, source, number, start, inside, new_ptr, new_tokens, ring_ptr, ring, D: tl.constexpr
):  # fmt: skip
    """Channels `source` of tokens [rows] of one head, new ones or from the ring: [rows, channels]."""
    inner = inside[:, None] & (source < D)[None, :]
    is_new = (number >= start)[:, None]
    x = tl.load(
        new_ptr + (head * new_tokens + (number - start))[:, None] * D + source[None, :],
        mask=inner & is_new, other=0.0,
    )  # fmt: skip
    held = tl.load(
        ring_ptr + (head * ring + number % ring)[:, None] * D + source[None, :],
        mask=inner & (is_new == 0), other=0.0,
    )  # fmt: skip
    if new_ptr.dtype == ring_ptr.dtype:
        x = tl.where(is_new, x, held)
    else:
        x = x.to(tl.float32) + held.to(tl.float32)
    return x


@triton.jit
def _as_it_is(
    source, first_head, number, start, inside, real, new_ptr, new_tokens, ring_ptr, ring, D: tl.constexpr
):  # fmt: skip
    """Flattened channels `source` of tokens [rows], new ones or from the ring: fp32 [rows, channels]."""
    head = first_head[:, None] + (source // D)[None, :]
    inner, is_new = inside[:, None] & real[None, :], (number >= start)[:, None]
    y = tl.load(
        new_ptr + (head * new_tokens + (number - start)[:, None]) * D + (source % D)[None, :],
        mask=inner & is_new, other=0.0,
    ).to(tl.float32)  # fmt: skip
    held = tl.load(
        ring_ptr + (head * ring + (number % ring)[:, None]) * D + (source % D)[None, :],
        mask=inner & (is_new == 0), other=0.0,
    )  # fmt: skip
    return y + held.to(tl.float32)


@triton.jit
def _transformed(
    unit, row, tokens, rows_total, batch, number, start, inside, channel, real,
    new_ptr, new_tokens, ring_ptr, ring, matrix_ptr, mean_ptr, angle_ptr, position_ptr, position_stride,
    units, U: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """Keys less their means, times the unit's matrix: `channel` of a group, fp32 [ROWS, channels].

    The matrix comes in steps that fit registers. A single row keeps the sum's terms apart to the end.
    """
    STEP: tl.constexpr = 32 if DP > 32 else DP
    TURNS: tl.constexpr = 32 if PAIRS > 32 else PAIRS
    UNROLL: tl.constexpr = DP // STEP if ROWS == 1 else 1
    y = tl.zeros([ROWS, channel.shape[0]], tl.float32)
    source = tl.arange(0, STEP)
    matrix_ptr += source[:, None] * WIDTH + channel[None, :]
    if PAIRS > 0:
        newest = tl.load(position_ptr + batch * position_stride, mask=row < rows_total, other=0)
        place = (newest + (row % tokens + 1 - tokens - LAG)).to(tl.float64)[:, None]
        pair = tl.arange(0, TURNS)
        mean_ptr += pair[:, None] * WIDTH + channel[None, :]
        keep = real[None, :] & (pair >= 0)[:, None]
        terms = tl.zeros([TURNS, channel.shape[0]], tl.float32)
        for p0 in tl.range(0, PAIRS, TURNS, loop_unroll_factor=UNROLL):
            by_cos = tl.load(mean_ptr + p0 * WIDTH, mask=keep, other=0.0)
            by_sin = tl.load(mean_ptr + (p0 + PAIRS) * WIDTH, mask=keep, other=0.0)
            cos, sin = cos_sin(place * tl.load(angle_ptr + p0 + pair)[None, :])
            if ROWS == 1:
                terms += tl.trans(cos) * by_cos + tl.trans(sin) * by_sin
            else:
                y = wave_product(-sin, by_sin, wave_product(-cos, by_cos, y))
        if ROWS == 1:
            y -= tl.sum(terms, 0)[None, :]
    for u in tl.static_range(U):
        head = batch * (units * U) + unit * U + u
        terms = tl.zeros([STEP, channel.shape[0]], tl.float32)
        for c0 in tl.range(0, DP, STEP, loop_unroll_factor=UNROLL):
            matrix = tl.load(
                matrix_ptr + (u * D + c0) * WIDTH, mask=(c0 + source < D)[:, None] & real[None, :], other=0.0
            )
            x = _rows_of(head, c0 + source, number, start, inside, new_ptr, new_tokens, ring_ptr, ring, D)
            if ROWS == 1:
                terms += tl.trans(x.to(tl.float32)) * matrix
            else:
                y = product(x, matrix, y)
        if ROWS == 1:
            y += tl.sum(terms, 0)[None, :]
    return y


@triton.jit
def turn_program(
    program, newest, row_blocks, rows_total, ring_keys, ring, key_matrix, key_mean, angle_ptr, position_ptr,
    position_stride, units, turned_ptr,
    U: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """Keys of the ring that were new LAG tokens ago, one a sequence, transformed: some channels of
    `turned_ptr`, fp32 [B, units, U * D].
    """
    WIDTH: tl.constexpr = U * D
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    part, block, unit = program % parts, program // parts % row_blocks, program // parts // row_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    batch, leaving = row.to(tl.int64), newest - LAG + row * 0
    inside = (row < rows_total) & (leaving >= 0)
    channel = part * COLUMNS + tl.arange(0, COLUMNS)
    real = channel < WIDTH
    key_matrix += tl.cast(unit * U * D, tl.int64) * WIDTH
    key_mean += tl.cast(unit * 2 * PAIRS, tl.int64) * WIDTH
    if ROWS == 1 and U == 1 and DP * COLUMNS <= 2048:  # what one warp's registers hold at once
        source, pair = tl.arange(0, DP), tl.arange(0, PAIRS if PAIRS > 0 else 1)
        matrix = tl.load(
            key_matrix + source[:, None] * WIDTH + channel[None, :],
            mask=(source < D)[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        x = _rows_of(
            batch * units + unit, source, leaving, newest + 1, inside, ring_keys, 1, ring_keys, ring, D
        )
        if PAIRS > 0:
            waves = key_mean + pair[:, None] * WIDTH + channel[None, :]
            keep = real[None, :] & (pair >= 0)[:, None]
            by_cos = tl.load(waves, mask=keep, other=0.0)
            by_sin = tl.load(waves + PAIRS * WIDTH, mask=keep, other=0.0)
            place = tl.load(position_ptr + batch * position_stride) - LAG
            angle = tl.load(angle_ptr + pair)
        tl.debug_barrier()  # so that all loads are under way before the first is waited for
        y = tl.sum(tl.trans(x.to(tl.float32)) * matrix, 0)
        if PAIRS > 0:
            cos, sin = cos_sin(place.to(tl.float64)[:, None] * angle[None, :])
            y -= tl.sum(tl.trans(cos) * by_cos + tl.trans(sin) * by_sin, 0)
        y = y[None, :]
    else:
        y = _transformed(
            unit, row, 1, rows_total, batch, leaving, newest + 1, inside, channel, real, ring_keys, 1,
            ring_keys, ring, key_matrix, key_mean, angle_ptr, position_ptr, position_stride, units, U, D, DP,
            WIDTH, ROWS, PAIRS, LAG,
        )  # fmt: skip
    at = turned_ptr + (batch * units + unit)[:, None] * WIDTH + channel[None, :]
    tl.store(at, y, mask=inside[:, None] & real[None, :])


@triton.jit
def _quantize_group(
    unit, group, block, tokens, rows_total, first, start, newest_sinks_ptr,
    new_ptr, ring_ptr, ring, matrix_ptr, mean_ptr, angle_ptr, position_ptr, position_stride,
    codes_ptr, scale_ptr, offset_ptr, capacity, clip, units, new_tokens,
    U: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BITS: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    SINKS: tl.constexpr, SINKS_PADDED: tl.constexpr, MIDPOINT: tl.constexpr, KIND: tl.constexpr,
    WRAPS: tl.constexpr, MARK: tl.constexpr, LAG: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Rows of one quantization group: gather, transform, quantize, pack, store.

    By their KIND, rows are transformed by a "matrix"; or "turned" by it, in a launch that this one may be
    DEPENDENT on, and are what `new_ptr` has, fp32 [B, units, GROUPS * GROUP]; or "ordered", so that codes
    have other places than their groups (op `quantize`), by the order at `matrix_ptr`; or "plain".
    """
    PBITS: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 8 // PBITS
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < rows_total
    batch, number = (row // tokens).to(tl.int64), first + row % tokens
    inside = inside & (number >= 0)
    if not WRAPS:
        inside = inside & (number < capacity)
    column = tl.arange(0, PLANES * WIDTH)
    real = column % WIDTH < GROUP // PLANES
    channel = column // WIDTH * (GROUP // PLANES) + column % WIDTH  # within the group
    if MARK and SINKS > 0:
        sink = tl.arange(0, SINKS_PADDED)
        marked = tl.load(
            newest_sinks_ptr + batch[:, None] * SINKS + sink[None, :],
            mask=(row < rows_total)[:, None] & (sink < SINKS)[None, :], other=-1,
        )  # fmt: skip
    if KIND == "turned":
        if DEPENDENT:
            gdc_wait()
        y = tl.load(
            new_ptr + ((batch * units + unit) * GROUPS + group)[:, None] * GROUP + channel[None, :],
            mask=inside[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
    elif KIND == "matrix":
        turned_group = tl.cast(unit * U * D, tl.int64) * (GROUPS * GROUP) + group * GROUP
        y = _transformed(
            unit, row, tokens, rows_total, batch, number, start, inside, channel, real,
            new_ptr, new_tokens, ring_ptr, ring, matrix_ptr + turned_group,
            mean_ptr + tl.cast(unit * 2 * PAIRS, tl.int64) * (GROUPS * GROUP) + group * GROUP,
            angle_ptr, position_ptr, position_stride, units, U, D, DP, GROUPS * GROUP, ROWS, PAIRS, LAG,
        )  # fmt: skip
    else:
        source = group * GROUP + channel
        if KIND == "ordered":
            source = tl.load(matrix_ptr + source, mask=real, other=0)
        first_head = batch * (units * U) + unit * U
        y = _as_it_is(source, first_head, number, start, inside, real, new_ptr, new_tokens, ring_ptr, ring, D)
    if KIND == "ordered":
        # codes of this group's places, by the grids of all groups
        scale, offset, flat = y * 0.0, y * 0.0, y != y
        own_scale = tl.zeros([ROWS, 1], tl.float32)
        own_offset = own_scale
        for g in range(GROUPS):
            x = _as_it_is(
                g * GROUP + channel, first_head, number, start, inside, real, new_ptr, new_tokens, ring_ptr,
                ring, D,
            )  # fmt: skip
            of_group, shift, level = _grid(x, real, BITS, clip, MIDPOINT)
            here = (source // GROUP == g)[None, :]
            scale, offset = tl.where(here, of_group, scale), tl.where(here, shift, offset)
            flat = tl.where(here, level, flat)
            own_scale = tl.where(g == group, of_group, own_scale)
            own_offset = tl.where(g == group, shift, own_offset)
        codes = _levels(y, scale, offset, flat, BITS, MIDPOINT)
        scale, offset = own_scale, own_offset
    else:
        scale, offset, flat = _grid(y, real, BITS, clip, MIDPOINT)
        codes = _levels(y, scale, offset, flat, BITS, MIDPOINT)
    scale, offset = tl.sum(scale, 1), tl.sum(offset, 1)
    codes = tl.where(real[None, :], codes, 0.0).to(tl.int32)
    slot = number
    if WRAPS:
        slot = number % capacity
    at = (batch * (units * GROUPS) + unit * GROUPS + group) * capacity + slot
    if BITS == 3:
        low: tl.constexpr = GROUP // 4
        _store_planes(codes & 3, codes_ptr + at * BYTES, inside, ROWS, WIDTH, 2, low)
        _store_planes(codes >> 2, codes_ptr + at * BYTES + low, inside, ROWS, WIDTH // 2, 1, GROUP // 8)
    else:
        _store_planes(codes, codes_ptr + at * BYTES, inside, ROWS, WIDTH, BITS, BYTES)
    if MARK and SINKS > 0:
        # a sink is read from its exact form: the negative scale hides its codes
        chosen = tl.max((marked == number[:, None]).to(tl.int32), 1) > 0
        scale = tl.where(chosen, -scale, scale)
    tl.store(scale_ptr + at, scale.to(tl.float16), mask=inside)
    tl.store(offset_ptr + at, offset.to(offset_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_program(
    program, start, key_programs, row_blocks, tokens, rows_total, new_tokens,
    new_keys, new_values, ring_keys, ring_values, ring, sink_tokens,
    key_matrix, key_mean, angle_ptr, position_ptr, position_stride,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    key_clip, value_clip, units,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, U: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KGROUP: tl.constexpr, VGROUP: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KBYTES: tl.constexpr, VBYTES: tl.constexpr, KWIDTH: tl.constexpr, VWIDTH: tl.constexpr,
    PAIRS: tl.constexpr, SINKS: tl.constexpr, SINKS_PADDED: tl.constexpr, MIDPOINT: tl.constexpr,
    KEYS: tl.constexpr, WRAPS: tl.constexpr, LAG: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Key programs, then value programs: `tokens` of each sequence become codes, the last of them LAG tokens
    before the newest. KEYS are of a kind that `_quantize_group` names.
    """
    first = start + new_tokens - LAG - tokens
    if program < key_programs:
        _quantize_group(
            program // row_blocks // KG, program // row_blocks % KG, program % row_blocks, tokens, rows_total,
            first, start, sink_tokens, new_keys, ring_keys, ring, key_matrix, key_mean, angle_ptr,
            position_ptr, position_stride, key_codes, key_scale, key_offset, capacity, key_clip, units,
            new_tokens, U, D, DP, KGROUP, KG, KBITS, KBYTES, KWIDTH, ROWS, PAIRS, SINKS, SINKS_PADDED,
            MIDPOINT, KEYS, WRAPS, True, LAG, DEPENDENT,
        )  # fmt: skip
    else:
        index = program - key_programs
        _quantize_group(
            index // row_blocks // VG, index // row_blocks % VG, index % row_blocks, tokens, rows_total,
            first, start, sink_tokens, new_values, ring_values, ring, key_matrix, key_mean, angle_ptr,
            position_ptr, position_stride, value_codes, value_scale, value_offset, capacity, value_clip,
            units, new_tokens, U, DV, DP, VGROUP, VG, VBITS, VBYTES, VWIDTH, ROWS, 0, SINKS, SINKS_PADDED,
            MIDPOINT, "plain", WRAPS, False, LAG, False,
        )  # fmt: skip
