"""Decode attention over packed history, sinks and recent tokens: split-KV Triton kernels.

Three launches make a step: `step_kernel` (rotate the query, store the new token), `decode_kernel` (parts of
the sums over tokens; and the key that the next step reads through its codes, transformed) and `finish_kernel`
(combine the parts, and quantize that key and its value). Where that token is the new one, with a window of
one or none, the first launch does it. On Hopper each starts before the one ahead of it has ended, and waits
where it needs that one's results.

A program is one warp, so that its scores stay in its registers on the way to the values. Heads that share a
quantization group or a rotation form a unit of U heads: R = U * r query rows (r = Hq / Hkv) meet all channels
of the unit, and the rows' own head picks its share of the values at the end.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.attention.exact import attend_exact
from rotatekv_fx.kernels.attention.history import attend_history
from rotatekv_fx.kernels.attention.scores import HIDDEN, LOG2E, LOWEST
from rotatekv_fx.kernels.held import Held, Scoring
from rotatekv_fx.kernels.quantize.planes import plane_words, query_width, wave_width
from rotatekv_fx.kernels.quantize.programs import quantize_program, turn_program
from rotatekv_fx.kernels.quantize.triton import launch_step, plane_width, quantizing


@triton.jit(do_not_specialize=["number", "mask_offset", "mask_columns", "mask_stride", "parts", "sequences"])
def decode_kernel(
    count_ptr, number, query_ptr, new_keys, new_values, plane_ptr, wave_ptr,
    key_matrix, key_mean, turned_ptr, sequences,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    position_ptr, position_stride, angle_ptr, table_ptr,
    scale, softcap, columns, units, parts, out_ptr, weight_ptr,
    COUNTED: tl.constexpr, R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    KG: tl.constexpr, VG: tl.constexpr, KGROUP: tl.constexpr, VGROUP: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KWORDS: tl.constexpr, VWORDS: tl.constexpr,
    KWP: tl.constexpr, VWP: tl.constexpr, PLACES: tl.constexpr, PAIRS: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, SLIDING: tl.constexpr, N: tl.constexpr, NE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS_FIRST: tl.constexpr, STAGES: tl.constexpr, MIDPOINT: tl.constexpr, WRAPS: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (B * units, parts + more): shares of the history first, then tiles of exact tokens; and after
    these parts, or before them, where there are ROWS, programs that transform so many sequences' keys that
    leave the window next.

    `number` is the new token's (read from `count_ptr` where COUNTED). `plane_ptr` and `wave_ptr` have rotated
    queries (`step_kernel`); or, where there are no key groups (KG is 0), `wave_ptr` has `columns` of scores a
    query row. `turned_ptr` receives the leaving keys, fp32 [B, units, U * D].
    out fp32 [B, units, parts, R, DV], weights fp32 [B, units, parts, R, 2]: each part's base, in units of
    log 2, and its sum of weights.
    """
    EXACT: tl.constexpr = (SINKS + NE - 1) // NE + (WINDOW + NE - 1) // NE
    if DEPENDENT:
        gdc_launch_dependents()
    newest = number
    if COUNTED:
        newest = tl.load(count_ptr).to(tl.int32)
    batch, unit = tl.program_id(0) // units, tl.program_id(0) % units
    more = tl.num_programs(1) - parts
    split, splits = tl.program_id(1), parts - EXACT
    if TURNS_FIRST:
        split -= more
    part = tl.program_id(0).to(tl.int64) * parts + split
    earliest = newest * 0
    if SLIDING > 0:
        earliest = tl.maximum(newest - SLIDING + 1, 0)
    if (split >= 0) & (split < splits):
        position = newest * 0
        if PAIRS > 0:
            position = tl.load(position_ptr + batch * position_stride).to(tl.int32) - newest
        attend_history(
            batch, unit, split, splits, part,
            earliest, tl.maximum(newest + 1 - WINDOW, earliest),
            plane_ptr, wave_ptr, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset,
            mask_ptr, mask_stride, mask_offset, mask_columns,
            position, angle_ptr, table_ptr, softcap, capacity, columns, units, out_ptr, weight_ptr,
            R, M, U, REPEATS, DV, KG, VG, KGROUP, VGROUP, KBITS, VBITS, KWORDS, VWORDS, KWP, VWP,
            PLACES, PAIRS, N, STAGES, MIDPOINT, WRAPS, MASKED, SOFTCAP, DEPENDENT, WINDOW > 1,
        )  # fmt: skip
    elif (split >= 0) & (split < parts):
        attend_exact(
            batch, unit, split - splits, part, newest, earliest,
            query_ptr, new_keys, new_values, recent_keys, recent_values, sink_keys, sink_values, sink_tokens,
            mask_ptr, mask_stride, mask_offset, mask_columns,
            scale, softcap, units, ring, wave_ptr, columns, out_ptr, weight_ptr,
            R, M, U, REPEATS, D, DV, DP, DVP, SINKS, WINDOW, NE, EXACT, KG == 0, MASKED, SOFTCAP,
        )  # fmt: skip
    elif ROWS > 0:
        blocks = tl.cdiv(sequences, ROWS)
        turn = split + more if TURNS_FIRST else split - parts
        program = turn * tl.num_programs(0) + tl.program_id(0)
        if program < units * blocks * ((U * D + COLUMNS - 1) // COLUMNS):
            turn_program(
                program, newest, blocks, sequences, recent_keys, ring, key_matrix, key_mean, angle_ptr,
                position_ptr, position_stride, units, turned_ptr, U, D, DP, COLUMNS, ROWS, PAIRS, WINDOW - 1,
            )  # fmt: skip


@triton.jit
def _combine(
    row, first_channel, part_ptr, weight_ptr, sink_logits, out_ptr, parts,
    R: tl.constexpr, DV: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some channels of one query row, of parts [parts, DV]. A sink logit (one a query head) joins the
    denominator.
    """
    first = (row // R).to(tl.int64) * parts * R + row % R
    part_ptr += first * DV
    weight_ptr += first * 2
    channel, block = first_channel + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    top, total = tl.full([], LOWEST, tl.float32), tl.full([], 0.0, tl.float32)
    if HAS_LOGITS:
        top, total = tl.load(sink_logits + row % HAS_LOGITS).to(tl.float32) * LOG2E, total + 1.0
    result = tl.zeros([COLUMNS], tl.float32)
    for p0 in range(0, parts, BLOCK):
        at = (p0 + block) * R
        inside = p0 + block < parts
        values = tl.load(
            part_ptr + at[:, None] * DV + channel[None, :],
            mask=inside[:, None] & (channel < DV)[None, :], other=0.0,
        )  # fmt: skip
        tl.debug_barrier()  # or the compiler waits for the first load before it issues the last
        highest = tl.load(weight_ptr + at * 2, mask=inside, other=HIDDEN)
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


@triton.jit(do_not_specialize=["number", "parts", "sequences", "code_programs"])
def finish_kernel(
    count_ptr, number, code_programs, part_ptr, weight_ptr, sink_logits, out_ptr, parts,
    turned_ptr, sequences, ring_values, ring, sink_tokens,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    key_clip, value_clip, units,
    COUNTED: tl.constexpr, R: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, U: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KGROUP: tl.constexpr, VGROUP: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KBYTES: tl.constexpr, VBYTES: tl.constexpr, KWIDTH: tl.constexpr, VWIDTH: tl.constexpr,
    SINKS: tl.constexpr, SINKS_PADDED: tl.constexpr, MIDPOINT: tl.constexpr, WRAPS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid: where there are ROWS, programs that quantize so many sequences' tokens that leave the window
    next, from transformed keys and the ring's values; then B * units * R times DV / COLUMNS programs that
    combine.
    """
    program = tl.program_id(0)
    if ROWS > 0:  # noqa: SIM102, a constant and a runtime condition
        if program < code_programs:
            blocks = tl.cdiv(sequences, ROWS)
            newest = number
            if COUNTED:
                newest = tl.load(count_ptr).to(tl.int32)
            quantize_program(
                program, newest + 1, units * KG * blocks, blocks, 1, sequences, 1,
                turned_ptr, ring_values, ring_values, ring_values, ring, sink_tokens,
                turned_ptr, turned_ptr, turned_ptr, count_ptr, 0,
                key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
                key_clip, value_clip, units, D, DV, D, U, KG, VG, KGROUP, VGROUP, KBITS, VBITS, KBYTES,
                VBYTES, KWIDTH, VWIDTH, 0, SINKS, SINKS_PADDED, MIDPOINT, "turned", WRAPS, WINDOW, ROWS,
                DEPENDENT,
            )  # fmt: skip
    program -= code_programs
    if program >= 0:
        if DEPENDENT:
            gdc_wait()
        tiles: tl.constexpr = (DV + COLUMNS - 1) // COLUMNS
        _combine(
            program // tiles, program % tiles * COLUMNS, part_ptr, weight_ptr, sink_logits, out_ptr, parts,
            R, DV, HAS_LOGITS, BLOCK, COLUMNS,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parts:
    """What kernels read of a packed layer beside its history; others stand in for what there is not.

    Attributes:
        counter, position: of the new token, and the way from one sequence's position to the next one's.
        recent, sinks: exact tokens, of the same dtype.
        shown: the mask, and the way from one sequence's row to the next one's.
        masked: whether it is one of bytes (1) or is added to scores (2), or there is none (0).
        sink_count, exact_tile, exact_tiles: how many sinks, and how exact tokens are cut into tiles.
    """

    counter: Tensor
    position: Tensor
    position_stride: int
    recent: tuple[Tensor, Tensor]
    sinks: tuple[Tensor, Tensor, Tensor]
    shown: Tensor
    shown_stride: int
    shown_columns: int
    masked: int
    sink_count: int
    exact_tile: int
    exact_tiles: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, held: Held, mask: Tensor | None, exact_tile: int) -> Parts:
        """Of a new token's contiguous key and value, a layer and its mask."""
        position = held.position.contiguous()
        sinks = tuple(held.sinks)
        recent = tuple(held.recent) or sinks[:2] or (key, value)
        shown, masked = position, 0
        if mask is not None:
            shown, masked = mask.contiguous(), 2
            if mask.dtype is torch.bool:
                shown, masked = shown.view(torch.int8), 1
        count = sinks[2].shape[1] if sinks else 0
        return cls(
            position if held.count is None else held.count,
            position,
            0 if position.shape[0] == 1 else 1,
            recent,
            sinks or (*recent, position),
            shown,
            0 if mask is None or mask.shape[0] == 1 else shown.stride(0),
            0 if mask is None else mask.shape[1],
            masked,
            count,
            exact_tile,
            triton.cdiv(count, exact_tile) + triton.cdiv(held.window, exact_tile),
        )


def decode(query: Tensor, key: Tensor, value: Tensor, held: Held, scoring: Scoring) -> Tensor:
    """The op `rotatekv::decode` (`rotatekv_fx.ops` describes it), in three launches."""
    batch, query_heads, _, dim = query.shape
    query, key, value = (x.contiguous() for x in (query, key, value))
    groups, _ = held.unit_groups(key, value)
    places = groups * query_width(held.key_group, held.key_bits)
    rotated = (
        query.new_empty((batch, query_heads, places), dtype=torch.float16),
        query.new_empty((batch, query_heads, wave_width(len(held.key_map[3]))), dtype=torch.float32),
    )
    codes = quantizing(key, value, held)
    launch_step(
        codes, held, 1 if held.recent else 0, 0 if held.window > 1 else codes.programs, query, rotated,
        scoring.scale * math.log2(math.e), tuning.dependent_launch(query.device),
    )  # fmt: skip
    parts = Parts.of(key, value, held, scoring.mask, 32 if held.unit_heads(key) == 1 and dim <= 128 else 16)
    return attend(query, key, value, held, scoring, parts, rotated)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: Held,
    scoring: Scoring,
    parts: Parts,
    rotated: tuple[Tensor, Tensor],
    scored: bool = False,
) -> Tensor:
    """The last two launches: attend to the layer, combine, and quantize what leaves the window next, but not
    where `scored` or with a window of one or none.

    Args:
        rotated: queries rotated and scaled, as `step_kernel` leaves them; or, where `scored`, twice the fp32
            [B, Hq, N + exact] scores of the history's slots and of the exact tokens in tiles, in units of
            log 2.
        others: as in `decode`.
    """
    batch, query_heads, _, dim = query.shape
    heads, value_dim = value.shape[1], value.shape[3]
    dependent = tuning.dependent_launch(query.device) and not scored
    launch = {"launch_pdl": True} if dependent else {}
    history = held.history
    if scored:
        unit_heads = math.lcm(held.value_group, value_dim) // value_dim
        key_groups, angles, table, columns = 0, parts.position, parts.position, rotated[1].shape[2]
    else:
        unit_heads = heads // held.units
        key_groups, columns = unit_heads * dim // held.key_group, 0
        angles, table = held.key_map[3:5]
    units, pairs = heads // unit_heads, 0 if scored else len(angles)
    value_groups = unit_heads * value_dim // held.value_group
    repeats = query_heads // heads
    rows = unit_heads * repeats
    channels = max(key_groups * held.key_group, value_groups * held.value_group)
    turned_channels = unit_heads * dim if held.window > 1 and not scored else 0
    choice = tuning.decode_choice(
        query.device, batch, units, held.capacity, rows, channels, parts.exact_tiles, turned_channels
    )
    count_parts = choice.splits + parts.exact_tiles
    out_parts = query.new_empty((batch * units, count_parts, rows, value_dim), dtype=torch.float32)
    weights = query.new_empty((batch * units, count_parts, rows, 2), dtype=torch.float32)
    out = query.new_empty((batch, 1, query_heads, value_dim))
    turn_rows, code_rows = (choice.turn_rows, tuning.code_rows(batch)) if turned_channels else (0, 0)
    turn_programs = code_programs = 0
    if turned_channels:
        turn_programs = triton.cdiv(batch, turn_rows) * triton.cdiv(turned_channels, choice.turn_columns)
        code_programs = triton.cdiv(batch, code_rows) * units * (key_groups + value_groups)
    turned = query.new_empty((batch, units, max(1, turned_channels)), dtype=torch.float32)
    sizes = {
        "COUNTED": held.count is not None, "U": unit_heads, "D": dim, "DV": value_dim, "KG": key_groups,
        "VG": value_groups, "KGROUP": held.key_group, "VGROUP": held.value_group, "KBITS": held.key_bits,
        "VBITS": held.value_bits, "SINKS": parts.sink_count, "WINDOW": held.window,
        "MIDPOINT": held.scheme == "midpoint", "WRAPS": held.wraps, "DEPENDENT": dependent,
    }  # fmt: skip
    decode_kernel[(batch * units, count_parts + triton.cdiv(turn_programs, batch))](
        parts.counter, held.number, query, key, value, *rotated, held.key_map[0], held.key_map[1],
        turned, batch,
        history[0].view(torch.int16), history[1], history[2],
        history[3].view(torch.int16), history[4], history[5], held.capacity,
        *parts.recent, parts.recent[0].shape[2], *parts.sinks,
        parts.shown, parts.shown_stride, scoring.mask_offset, parts.shown_columns,
        parts.position, parts.position_stride, angles, table,
        scoring.scale, scoring.softcap, columns, units, count_parts, out_parts, weights,
        R=rows, M=max(8, triton.next_power_of_2(rows)), REPEATS=repeats,
        DP=triton.next_power_of_2(dim), DVP=triton.next_power_of_2(value_dim),
        KWORDS=history[0].shape[3] // 2, VWORDS=history[3].shape[3] // 2,
        KWP=plane_words(held.key_group, held.key_bits), VWP=plane_words(held.value_group, held.value_bits),
        PLACES=query_width(held.key_group, held.key_bits), PAIRS=pairs,
        SLIDING=scoring.sliding, N=choice.tile, NE=parts.exact_tile, ROWS=turn_rows,
        COLUMNS=choice.turn_columns, TURNS_FIRST=choice.turns_first, STAGES=choice.stages,
        MASKED=parts.masked, SOFTCAP=scoring.softcap != 0.0, **sizes,
        num_warps=1, num_stages=choice.stages, **launch,
    )  # fmt: skip
    logits = scoring.sink_logits
    block, columns = tuning.combine_block(count_parts, value_dim)
    finish_kernel[(code_programs + batch * query_heads * triton.cdiv(value_dim, columns),)](
        parts.counter, held.number, code_programs, out_parts, weights,
        weights if logits is None else logits, out, count_parts,
        turned, batch, parts.recent[1], parts.recent[1].shape[2], parts.sinks[2],
        *history, held.capacity, held.key_clip, held.value_clip, units,
        R=rows, HAS_LOGITS=0 if logits is None else query_heads, BLOCK=block, COLUMNS=columns, ROWS=code_rows,
        KBYTES=history[0].shape[3], VBYTES=history[3].shape[3],
        KWIDTH=plane_width(held.key_group, held.key_bits),
        VWIDTH=plane_width(held.value_group, held.value_bits),
        SINKS_PADDED=triton.next_power_of_2(max(1, parts.sink_count)), **sizes,
        num_warps=tuning.finish_warps(block), **launch,
    )  # fmt: skip
    return out
