"""Decode attention over keys stored before RoPE, rotated over G neighbouring heads: a Triton kernel that
makes the scores; the kernels of `decode` do the rest.

A program serves a unit of G heads and a share of the tokens, one rotated head after another. A head's codes
are words of 16 bits, read as in `history.py`; the scales and offsets of their channels, which may belong to
any group, are spread from groups to channels by a product with a 0-1 matrix. Channels that RoPE turns
together lie in neighbouring places (`rotatekv_fx.ops.packed`), even ones in the low bytes of words and odd
ones in the high bytes. Each half is rotated back by a product, the last stage of the Walsh-Hadamard matrix
adds and subtracts the halves, and RoPE mixes the two results, all in the registers in which products leave
them. It turns a key by its place in the tile, by a fixed table; the rest of the turn is the query's, by a
fixed angle from tile to tile. Where no exchange of places makes partners neighbours, the key is multiplied by
all cosines and by all sines instead. The sum over heads is taken of the scores, of which there are fewer than
channels.

Products are few and large because a program waits for each. Scales are read a tile ahead of their use. So are
words, and the 0-1 matrices of all heads are kept, where shared memory has room for both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.attention.exact import exact_tokens
from rotatekv_fx.kernels.attention.scores import HIDDEN, INTERPRETED, mask_words, shows
from rotatekv_fx.kernels.attention.triton import Parts, attend
from rotatekv_fx.kernels.held import Held, Scoring
from rotatekv_fx.kernels.quantize.planes import code_plane, plane_factor
from rotatekv_fx.kernels.quantize.programs import cos_sin
from rotatekv_fx.kernels.quantize.triton import launch_step, quantizing

_EXACT_TILE = 16
_UNIT = tl.constexpr(256.0)  # keys enter the products as shares of the token's largest, over this
_STEP_UNIT = tl.constexpr(65536.0)  # and codes as fp16 subnormals: 2^24 / 256


@triton.jit
def _halves(x):
    """x [rows, 2 * W] as two [rows, W]."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _above(x, y):
    """x and y [rows, W] as one [2 * rows, W]."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), [2 * x.shape[0], x.shape[1]])


@triton.jit
def _upper_and_lower(x):
    """x [2 * rows, W] as two [rows, W]."""
    return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), (1, 2, 0)))


@triton.jit
def _beside(parts, LOG: tl.constexpr):
    """2^LOG tensors [rows, W] as one [rows, 2^LOG * W]."""
    for stage in tl.static_range(LOG):
        wider = ()
        for i in tl.static_range(1 << (LOG - stage - 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            wider = wider + (tl.reshape(pair, [pair.shape[0], 2 * pair.shape[2]]),)
        parts = wider
    return parts[0]


@triton.jit
def _columns(parts, LOG: tl.constexpr):
    """x [rows, 2^LOG * W] as 2^LOG tensors [rows, W]."""
    for stage in tl.static_range(LOG):
        narrower = ()
        for i in tl.static_range(1 << stage):
            low, high = _halves(parts[i])
            narrower = narrower + (low, high)
        parts = narrower
    return parts


@triton.jit
def _numbers(
    words, steps, shifts, FIRST: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, LOG: tl.constexpr
):
    """fp16 code * step + shift of every second channel; steps in units of 2^-24."""
    steps, shifts = _columns((steps,), LOG), _columns((shifts,), LOG)
    parts = ()
    for i in tl.static_range(1 << LOG):
        factor = tl.full([1, 1], plane_factor(FIRST + i % PLANES, BITS), tl.float16)
        codes = code_plane(words[i // PLANES], FIRST + i % PLANES, BITS)
        parts = parts + (codes * (steps[i] * factor) + shifts[i],)
    return _beside(parts, LOG)


@triton.jit
def _turned(first, other, cos, sin):
    """The last stage of a Walsh-Hadamard product, whose results are partners, and their turn by RoPE; fp16.

    On a GPU two numbers at a time: left to itself the compiler pairs others, and moves them about.
    """
    if INTERPRETED:
        even, odd = first + other, first - other
        return even * cos + odd * sin, odd * cos - even * sin
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 even, odd, part;
        add.f16x2 even, $2, $3;
        sub.f16x2 odd, $2, $3;
        mul.f16x2 part, odd, $5;
        fma.rn.f16x2 $0, even, $4, part;
        mul.f16x2 part, even, $5;
        neg.f16x2 part, part;
        fma.rn.f16x2 $1, odd, $4, part;
        }""",
        "=&r,=&r,r,r,r,r", [first, other, cos, sin], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _query(row, inside, query_ptr, place, real, axis_ptr, size_ptr, D: tl.constexpr):
    """fp32 [places, rows] of a query in the places' channels, and in those of their partners."""
    keep = real[:, None] & inside[None, :]
    size = tl.load(size_ptr + place, mask=real, other=0.0)[:, None]
    own = tl.load(axis_ptr + place, mask=real, other=0)[:, None]
    partner = tl.load(axis_ptr + D + place, mask=real, other=0)[:, None]
    own = tl.load(query_ptr + row[None, :] * D + own, mask=keep, other=0.0)
    partner = tl.load(query_ptr + row[None, :] * D + partner, mask=keep, other=0.0)
    return own.to(tl.float32) * size, partner.to(tl.float32) * size


@triton.jit
def _places(n0, tokens, first, stop, capacity, WRAPS: tl.constexpr):
    """Numbers of a tile's tokens, whether the share has them, and their slots."""
    number = n0 + tokens
    slot = number
    if WRAPS:
        slot = slot % capacity
    return number, (number >= first) & (number < stop), slot


@triton.jit
def _scales(
    n0, tokens, first, stop, key_scale, key_offset, of_group, real_group, capacity, WRAPS: tl.constexpr
):
    """A tile's signs (below zero where nothing is shown), scales and offsets, as they are stored."""
    _, held, slot = _places(n0, tokens, first, stop, capacity, WRAPS)
    keep = held[:, None] & real_group
    return (
        tl.load(key_scale + slot, mask=held, other=-1.0),
        tl.load(key_scale + of_group + slot[:, None], mask=keep, other=0.0),
        tl.load(key_offset + of_group + slot[:, None], mask=keep, other=0),
    )


@triton.jit
def _spread(order_ptr, group, place, real, GROUP: tl.constexpr):
    """fp16 [groups, places]: 1 where the channel in a head's place is of the group."""
    source = tl.load(order_ptr + place, mask=real, other=0)
    return tl.where((group[:, None] == (source // GROUP)[None, :]) & real[None, :], 1.0, 0.0).to(tl.float16)


@triton.jit
def _score_history(
    batch, unit, split, splits, first, last, position, query_ptr,
    order_ptr, matrix_ptr, mixing_ptr, axis_ptr, size_ptr, angle_ptr, table_ptr,
    key_codes, key_scale, key_offset, capacity, mask_ptr, mask_stride, mask_offset, mask_columns,
    scale, score_ptr, columns, units,
    G: tl.constexpr, REPEATS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, KG: tl.constexpr,
    KGP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    LOG: tl.constexpr, N: tl.constexpr, MIDPOINT: tl.constexpr, WRAPS: tl.constexpr, MASKED: tl.constexpr,
    PAIRED: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Scores of one share of the history."""
    R: tl.constexpr = G * REPEATS
    HALF: tl.constexpr = WP << LOG  # of a head's places, those that pad words included
    SHARE: tl.constexpr = GROUP // D if GROUP > D else 1  # heads whose codes lie with one group
    REGIONS: tl.constexpr = D // GROUP if D > GROUP else 1  # groups that a head's codes lie with
    PLANES: tl.constexpr = 8 // BITS // SHARE
    TOP: tl.constexpr = (1 << BITS) - 1
    rows, tokens, word, group = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WP), tl.arange(0, KGP)
    inside = rows < R
    skipped = first // N
    tiles = tl.cdiv(tl.cdiv(last, N) - skipped, splits)
    start = (skipped + split * tiles) * N
    stop = tl.minimum(start + tiles * N, last)
    key_rows = (batch * KG).to(tl.int64) * capacity
    key_scale += key_rows
    key_offset += key_rows
    key_codes += (key_rows + unit * (G * D // GROUP) * tl.cast(capacity, tl.int64)) * (2 * W)
    mask_ptr += batch.to(tl.int64) * mask_stride
    row = ((batch * units + unit) * R + rows).to(tl.int64)

    column = tl.arange(0, HALF)
    real = column % WP < W
    place = column // WP * (2 * W) + 2 * (column % WP)  # even ones; a channel's partner is in the next place
    matrix = tl.load(
        matrix_ptr + place[:, None] * D + place[None, :], mask=real[:, None] & real[None, :], other=0.0
    ).to(tl.float16)
    wide = tl.arange(0, 2 * HALF)  # the even places, then the odd ones
    all_real = wide % WP < W
    all_places = wide % HALF // WP * (2 * W) + 2 * (wide % WP) + wide // HALF
    order_ptr += unit * (G * D)
    spreads, mixings = (), ()
    for head in tl.static_range(G):
        if RESIDENT:
            spreads = spreads + (_spread(order_ptr + head * D, group, all_places, all_real, GROUP),)
        mixing = tl.load(mixing_ptr + head * G + rows // REPEATS, mask=inside, other=0.0)
        mixings = mixings + (mixing[None, :],)

    # coefficients of the turned key: of partners, or of a place's cosine and of its sine
    if PAIRED:
        turning, is_turning = place, real
    else:
        turning, is_turning = all_places, all_real
    own, partner = _query(row, inside, query_ptr, turning, is_turning, axis_ptr, size_ptr, D)
    largest = tl.max(tl.max(tl.maximum(tl.abs(own), tl.abs(partner)), 1), 0)
    largest = tl.maximum(largest, 1.0e-30)  # the unit's largest is brought to 1, so that fp16 holds all
    angles = tl.load(angle_ptr + turning, mask=is_turning, other=0.0)
    cos, sin = cos_sin((position + start).to(tl.float64) * angles)
    cos, sin = (cos / largest)[:, None], (sin / largest)[:, None]
    on_first, on_other = own * cos - partner * sin, partner * cos + own * sin
    cos, sin = cos_sin(N * angles)
    turn_cos, turn_sin = cos[:, None], sin[:, None]
    ANGLES: tl.constexpr = D // 2 if PAIRED else D
    table = table_ptr + tokens[:, None] * (2 * ANGLES) + (turning // (D // ANGLES))[None, :]
    eye = tl.where(turning[:, None] == turning[None, :], 1.0, 0.0).to(tl.float16)
    # through a product, or the compiler packs them anew for each use
    table_cos = tl.dot(tl.load(table, mask=is_turning[None, :], other=0.0), eye, out_dtype=tl.float16)
    table_sin = tl.dot(
        tl.load(table + ANGLES, mask=is_turning[None, :], other=0.0), eye, out_dtype=tl.float16
    )

    of_group, real_group = group.to(tl.int64)[None, :] * capacity, (group < KG)[None, :]
    shown, next_step, next_shift = _scales(
        start, tokens, first, stop, key_scale, key_offset, of_group, real_group, capacity, WRAPS
    )
    for n0 in tl.range(start, stop, N, num_stages=3 if RESIDENT else 1):
        number, held, slot = _places(n0, tokens, first, stop, capacity, WRAPS)
        seen = (shown.to(tl.float32) < 0.0) == 0
        step, shift = tl.abs(next_step.to(tl.float32)), next_shift.to(tl.float32)
        shown, next_step, next_shift = _scales(
            n0 + N, tokens, first, stop, key_scale, key_offset, of_group, real_group, capacity, WRAPS
        )
        if MASKED:
            said = mask_words(mask_ptr, number, held, mask_offset, mask_columns, MASKED)
            seen = seen & shows(said, MASKED)
        if not MIDPOINT:
            shift = -step * shift
        widest = tl.maximum(tl.max(tl.maximum(tl.abs(shift), step * TOP), 1), 1.0e-30)
        share = (1.0 / widest)[:, None]
        step, shift = (step * share * _STEP_UNIT).to(tl.float16), (shift * share / _UNIT).to(tl.float16)
        step_and_shift = _above(step, shift)
        query = _above(on_first, on_other).to(tl.float16)
        scores = tl.zeros([N, M], tl.float32)
        for block in tl.static_range(G // SHARE):
            words = ()
            for q in tl.static_range(REGIONS):
                region = (block * REGIONS + q) * tl.cast(capacity, tl.int64)
                bytes_at = (key_codes + region * (2 * W)).to(tl.pointer_type(tl.int16), bitcast=True)
                words = words + (
                    tl.load(
                        bytes_at + slot.to(tl.int64)[:, None] * W + word[None, :],
                        mask=held[:, None] & (word < W)[None, :] if W < WP else held[:, None], other=0,
                    ),
                )  # fmt: skip
            for s in tl.static_range(SHARE):
                if RESIDENT:
                    spread = spreads[block * SHARE + s]
                else:
                    head_order = order_ptr + (block * SHARE + s) * D
                    spread = _spread(head_order, group, all_places, all_real, GROUP)
                steps, shifts = _upper_and_lower(tl.dot(step_and_shift, spread, out_dtype=tl.float16))
                steps, shifts = _halves(steps), _halves(shifts)
                first_half = _numbers(words, steps[0], shifts[0], s * PLANES, BITS, PLANES, LOG)
                other_half = _numbers(words, steps[1], shifts[1], s * PLANES + 8 // BITS, BITS, PLANES, LOG)
                halves = tl.dot(_above(first_half, other_half), matrix, out_dtype=tl.float16)
                first_half, other_half = _upper_and_lower(halves)
                if PAIRED:
                    key_first, key_other = _turned(first_half, other_half, table_cos, table_sin)
                else:
                    key = _beside((first_half + other_half, first_half - other_half), 1)
                    key_first, key_other = key * table_cos, -key * table_sin
                rotated = tl.dot(_beside((key_first, key_other), 1), query)
                scores += rotated * mixings[block * SHARE + s]
        on_first, on_other = (
            on_first * turn_cos - on_other * turn_sin,
            on_other * turn_cos + on_first * turn_sin,
        )
        scores = scores * (widest * (largest * scale * _UNIT))[:, None]
        tl.store(
            score_ptr + row[None, :] * columns + slot[:, None], tl.where(seen[:, None], scores, HIDDEN),
            mask=held[:, None] & inside[None, :],
        )  # fmt: skip


@triton.jit
def _score_exact(
    batch, unit, tile, newest, earliest, position, query_ptr,
    order_ptr, matrix_ptr, mixing_ptr, axis_ptr, size_ptr, angle_ptr,
    recent_keys, ring, sink_keys, sink_tokens, mask_ptr, mask_stride, mask_offset, mask_columns,
    scale, score_ptr, columns, units,
    G: tl.constexpr, REPEATS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, NE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of sinks that left the window, or of the window's tokens, from column 0 on."""
    R: tl.constexpr = G * REPEATS
    STEP: tl.constexpr = 32 if D > 32 else D
    rows, place, source = tl.arange(0, M), tl.arange(0, D), tl.arange(0, STEP)
    inside, real = rows < R, place >= 0
    number, seen, _, keys, _, rows_held, slot = exact_tokens(
        batch, tile, newest, earliest, recent_keys, recent_keys, ring, sink_keys, sink_keys, sink_tokens,
        mask_ptr, mask_stride, mask_offset, mask_columns, SINKS, WINDOW, NE, MASKED,
    )  # fmt: skip
    angles = tl.load(angle_ptr + place)
    cos, sin = cos_sin((position + number).to(tl.float64)[:, None] * angles[None, :])
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    on_cos, on_sin = _query(row, inside, query_ptr, place, real, axis_ptr, size_ptr, D)
    first_head = (batch * units * G).to(tl.int64)
    scores = tl.zeros([NE, M], tl.float32)
    for g in range(G):
        key = tl.zeros([NE, D], tl.float32)
        for c0 in range(0, D, STEP):
            stored = tl.load(order_ptr + (unit * G + g) * D + c0 + source)
            at = ((first_head + stored // D) * rows_held)[None, :] + slot[:, None]
            x = tl.load(keys + at * D + (stored % D)[None, :], mask=seen[:, None], other=0.0)
            matrix = tl.load(matrix_ptr + (c0 + source)[:, None] * D + place[None, :])
            key = tl.dot(x, matrix.to(x.dtype), key)
        own = tl.dot(key * cos, on_cos, tl.zeros([NE, M], tl.float32), input_precision="tf32")
        own = tl.dot(key * -sin, on_sin, own, input_precision="tf32")
        mixing = tl.load(mixing_ptr + g * G + rows // REPEATS, mask=inside, other=0.0)
        scores += own * mixing[None, :]
    column = tile * NE + tl.arange(0, NE)
    tl.store(
        score_ptr + row[None, :] * columns + column[:, None], tl.where(seen[:, None], scores * scale, HIDDEN),
        mask=inside[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["number", "mask_offset", "mask_columns", "mask_stride"])
def score_kernel(
    count_ptr, number, query_ptr,
    order_ptr, matrix_ptr, mixing_ptr, axis_ptr, size_ptr, angle_ptr, table_ptr,
    key_codes, key_scale, key_offset, capacity, recent_keys, ring, sink_keys, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns, position_ptr, position_stride,
    scale, score_ptr, columns, units,
    COUNTED: tl.constexpr, G: tl.constexpr, REPEATS: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    KG: tl.constexpr, KGP: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, LOG: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, SLIDING: tl.constexpr,
    N: tl.constexpr, NE: tl.constexpr, MIDPOINT: tl.constexpr, WRAPS: tl.constexpr, MASKED: tl.constexpr,
    PAIRED: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Grid (B * units, splits + tiles): shares of the history first, then tiles of exact tokens.

    `number` is the new token's (read from `count_ptr` where COUNTED). scores fp32 [B, Hq, columns], in units
    of log 2: a column for each slot of the history, then one for each exact token.
    """
    EXACT: tl.constexpr = (SINKS + NE - 1) // NE + (WINDOW + NE - 1) // NE
    newest = number
    if COUNTED:
        newest = tl.load(count_ptr).to(tl.int32)
    batch, unit = tl.program_id(0) // units, tl.program_id(0) % units
    earliest = newest * 0
    if SLIDING > 0:
        earliest = tl.maximum(newest - SLIDING + 1, 0)
    position = tl.load(position_ptr + batch * position_stride).to(tl.int32) - newest
    split, splits = tl.program_id(1), tl.num_programs(1) - EXACT
    if split < splits:
        _score_history(
            batch, unit, split, splits, earliest, tl.maximum(newest + 1 - WINDOW, earliest), position,
            query_ptr, order_ptr, matrix_ptr, mixing_ptr, axis_ptr, size_ptr, angle_ptr, table_ptr,
            key_codes, key_scale, key_offset, capacity, mask_ptr, mask_stride, mask_offset, mask_columns,
            scale, score_ptr, columns, units,
            G, REPEATS, M, D, KG, KGP, GROUP, BITS, W, WP, LOG, N, MIDPOINT, WRAPS, MASKED,
            PAIRED, RESIDENT,
        )  # fmt: skip
    elif EXACT > 0:
        _score_exact(
            batch, unit, split - splits, newest, earliest, position, query_ptr,
            order_ptr, matrix_ptr, mixing_ptr, axis_ptr, size_ptr, angle_ptr,
            recent_keys, ring, sink_keys, sink_tokens, mask_ptr, mask_stride, mask_offset, mask_columns,
            scale, score_ptr + capacity, columns, units, G, REPEATS, M, D, SINKS, WINDOW, NE, MASKED,
        )  # fmt: skip


def decode_before_rope(query: Tensor, key: Tensor, value: Tensor, held: Held, scoring: Scoring) -> Tensor:
    """The op `rotatekv::decode_before_rope` (`rotatekv_fx.ops` describes it), in four launches."""
    batch, query_heads, _, dim = query.shape
    heads = key.shape[1]
    query, key, value = (x.contiguous() for x in (query, key, value))
    history, window = held.history, held.window
    codes = quantizing(key, value, held, "ordered")
    launch_step(codes, held, 1 if held.recent else 0, codes.programs)
    group = held.key_map[2].shape[0]
    units, repeats, groups = heads // group, query_heads // heads, history[0].shape[1]
    parts = Parts.of(key, value, held, scoring.mask, _EXACT_TILE)
    splits = tuning.score_splits(query.device, batch * units, held.capacity)
    columns = held.capacity + parts.exact_tiles * _EXACT_TILE
    scores = query.new_empty((batch, query_heads, columns), dtype=torch.float32)
    words = history[0].shape[3] // 2
    padded_words, padded_groups = max(16, words), max(16, triton.next_power_of_2(groups))
    # in a program's shared memory: a unit's matrices that spread scales, and two tiles of its words
    spreads = group * dim // words * padded_words * padded_groups * 2
    tiles = group * dim * held.key_bits // 8 // (2 * words) * padded_words * tuning.SCORE_TILE * 4
    resident = spreads + tiles <= tuning.SCORE_RESIDENT
    score_kernel[(batch * units, splits + parts.exact_tiles)](
        parts.counter, held.number, query, *held.key_map, *history[:3], held.capacity,
        parts.recent[0], parts.recent[0].shape[2], parts.sinks[0], parts.sinks[2],
        parts.shown, parts.shown_stride, scoring.mask_offset, parts.shown_columns, parts.position,
        parts.position_stride, scoring.scale * math.log2(math.e), scores, columns, units,
        COUNTED=held.count is not None, G=group, REPEATS=repeats,
        M=max(8, triton.next_power_of_2(group * repeats)), D=dim, KG=groups,
        KGP=padded_groups, GROUP=held.key_group, BITS=held.key_bits, W=words,
        WP=padded_words, LOG=(dim // words // 2).bit_length() - 1,
        SINKS=parts.sink_count, WINDOW=window, SLIDING=scoring.sliding, N=tuning.SCORE_TILE,
        NE=_EXACT_TILE, MIDPOINT=held.scheme == "midpoint", WRAPS=held.wraps, MASKED=parts.masked,
        PAIRED=held.key_map[6].shape[1] == dim, RESIDENT=resident, num_warps=4,
    )  # fmt: skip
    return attend(query, key, value, held, scoring, parts, (scores, scores), scored=True)
