"""Decode attention over packed history, sinks and recent tokens: split-KV Triton kernels.

Three launches make a step: `step_kernel` (rotate the query, store the new token), `decode_kernel` (parts of
the sums over tokens) and `finish_kernel` (combine the parts, and quantize the token that the next step reads
through its codes; without a window that is the new one, and the first launch does it). On Hopper each starts
before the one ahead of it has ended, and waits where it needs that one's results.

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
from rotatekv_fx.kernels.quantize.programs import quantize_program
from rotatekv_fx.kernels.quantize.triton import Quantizing, launch_step, quantizing


@triton.jit(do_not_specialize=["number", "mask_offset", "mask_columns", "mask_stride"])
def decode_kernel(
    count_ptr, number, query_ptr, rotated_ptr,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    position_ptr, position_stride, angle_ptr, table_ptr,
    scale, softcap, columns, units, out_ptr, weight_ptr,
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

    `number` is the new token's (read from `count_ptr` where COUNTED). `rotated_ptr` has rotated queries; or,
    where there are no key groups (KG is 0), `columns` of scores a query row.
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
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    earliest = newest * 0
    if SLIDING > 0:
        earliest = tl.maximum(newest - SLIDING + 1, 0)
    split, splits = tl.program_id(1), tl.num_programs(1) - EXACT
    if split < splits:
        position = newest * 0
        if PAIRS > 0:
            position = tl.load(position_ptr + batch * position_stride).to(tl.int32) - newest
        attend_history(
            batch, unit, split, splits, part,
            earliest, tl.maximum(newest + 1 - WINDOW, earliest),
            rotated_ptr, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset,
            mask_ptr, mask_stride, mask_offset, mask_columns,
            position, angle_ptr, table_ptr, softcap, capacity, columns, units, out_ptr, weight_ptr,
            R, M, U, REPEATS, DV, KG, VG, KGROUP, VGROUP, KBITS, VBITS, KWORDS, VWORDS, KWP, VWP, CP,
            PAIRS, N, STAGES, MIDPOINT, WRAPS, MASKED, SOFTCAP, DEPENDENT,
        )  # fmt: skip
    else:
        if DEPENDENT:
            gdc_wait()
        attend_exact(
            batch, unit, split - splits, part, newest, earliest,
            query_ptr, recent_keys, recent_values, sink_keys, sink_values, sink_tokens,
            mask_ptr, mask_stride, mask_offset, mask_columns,
            scale, softcap, units, ring, rotated_ptr, columns, out_ptr, weight_ptr,
            R, M, U, REPEATS, D, DV, DP, DVP, SINKS, WINDOW, NE, EXACT, KG == 0, MASKED, SOFTCAP,
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
    top, total = tl.full([], LOWEST, tl.float32), tl.full([], 0.0, tl.float32)
    if HAS_LOGITS:
        top, total = tl.load(sink_logits + row % HAS_LOGITS).to(tl.float32) * LOG2E, total + 1.0
    result = tl.zeros([COLUMNS], tl.float32)
    for p0 in range(0, parts, BLOCK):
        at = first + (p0 + block) * rows
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
    TRANSFORM: tl.constexpr, WRAPS: tl.constexpr, LAG: tl.constexpr, ROWS: tl.constexpr,
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
                VBYTES, KWIDTH, VWIDTH, PAIRS, SINKS, SINKS_PADDED, MIDPOINT, TRANSFORM, WRAPS, LAG,
                ROWS,
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


@dataclasses.dataclass(frozen=True)
class Parts:
    """What kernels read of a packed layer beside its history; others stand in for what there is not.

    Attributes:
        counter, position: of the new token, and the way from one sequence's position to the next one's.
        recent, sinks: exact tokens, of the same dtype.
        shown: the mask as bytes, and the way from one sequence's row to the next one's.
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
    masked: bool
    sink_count: int
    exact_tile: int
    exact_tiles: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, held: Held, mask: Tensor | None, exact_tile: int) -> Parts:
        """Of a new token's contiguous key and value, a layer and its mask."""
        position = held.position.contiguous()
        sinks = tuple(held.sinks)
        recent = tuple(held.recent) or sinks[:2] or (key, value)
        shown = position if mask is None else mask.contiguous().view(torch.int8)
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
            mask is not None,
            count,
            exact_tile,
            triton.cdiv(count, exact_tile) + triton.cdiv(held.window, exact_tile),
        )


def decode(query: Tensor, key: Tensor, value: Tensor, held: Held, scoring: Scoring) -> Tensor:
    """The op `rotatekv::decode` (`rotatekv_fx.ops` describes it), in three launches."""
    batch, query_heads, _, dim = query.shape
    query, key, value = (x.contiguous() for x in (query, key, value))
    rotated = query.new_empty((batch, query_heads, held.key_map[2].shape[2]), dtype=torch.float32)
    codes = quantizing(key, value, held)
    before, after = (0, codes.programs) if held.window else (codes.programs, 0)
    launch_step(
        codes, held, 1 if held.recent else 0, before, query, rotated, scoring.scale * math.log2(math.e),
        tuning.dependent_launch(query.device),
    )  # fmt: skip
    parts = Parts.of(key, value, held, scoring.mask, 32 if held.unit_heads(key) == 1 and dim <= 128 else 16)
    return attend(query, value, held, scoring, parts, codes, after, rotated)


def attend(
    query: Tensor,
    value: Tensor,
    held: Held,
    scoring: Scoring,
    parts: Parts,
    codes: Quantizing,
    after: int,
    rotated: Tensor,
    scored: bool = False,
) -> Tensor:
    """The last two launches: attend to the layer, and quantize by `after` programs of `codes`.

    Args:
        rotated: fp32 [B, Hq, C + 2P] queries, rotated and scaled; or, where `scored`, [B, Hq, N + exact]
            scores of the history's slots and of the exact tokens in tiles, in units of log 2.
        others: as in `decode`.
    """
    batch, query_heads, _, dim = query.shape
    heads, value_dim = value.shape[1], value.shape[3]
    dependent = tuning.dependent_launch(query.device) and not scored
    launch = {"launch_pdl": True} if dependent else {}
    history = held.history
    if scored:
        unit_heads = math.lcm(held.value_group, value_dim) // value_dim
        key_groups, angles, table, columns = 0, parts.position, parts.position, rotated.shape[2]
    else:
        unit_heads = heads // held.units
        key_groups, columns = unit_heads * dim // held.key_group, 0
        angles, table = held.key_map[3:]
    units, pairs = heads // unit_heads, 0 if scored else len(angles)
    value_groups = unit_heads * value_dim // held.value_group
    repeats = query_heads // heads
    rows = unit_heads * repeats
    channels = max(key_groups * held.key_group, value_groups * held.value_group)
    choice = tuning.decode_choice(
        query.device, batch * units, held.capacity, rows, channels, parts.exact_tiles
    )
    count_parts = choice.splits + parts.exact_tiles
    out_parts = query.new_empty((batch * units, count_parts, rows, value_dim), dtype=torch.float32)
    weights = query.new_empty((batch * units, count_parts, rows, 2), dtype=torch.float32)
    out = query.new_empty((batch, 1, query_heads, value_dim))
    decode_kernel[(batch * units, count_parts)](
        parts.counter, held.number, query, rotated,
        history[0].view(torch.int16), history[1], history[2],
        history[3].view(torch.int16), history[4], history[5], held.capacity,
        *parts.recent, parts.recent[0].shape[2], *parts.sinks,
        parts.shown, parts.shown_stride, scoring.mask_offset, parts.shown_columns,
        parts.position, parts.position_stride, angles, table,
        scoring.scale, scoring.softcap, columns, units, out_parts, weights,
        COUNTED=held.count is not None, R=rows, M=max(8, triton.next_power_of_2(rows)),
        U=unit_heads, REPEATS=repeats,
        D=dim, DV=value_dim, DP=triton.next_power_of_2(dim), DVP=triton.next_power_of_2(value_dim),
        KG=key_groups, VG=value_groups, KGROUP=held.key_group, VGROUP=held.value_group,
        KBITS=held.key_bits, VBITS=held.value_bits, KWORDS=history[0].shape[3] // 2,
        VWORDS=history[3].shape[3] // 2,
        KWP=_tensor_step(held.key_group, held.key_bits), VWP=_tensor_step(held.value_group, held.value_bits),
        CP=triton.next_power_of_2(max(1, key_groups * held.key_group)), PAIRS=pairs, SINKS=parts.sink_count,
        WINDOW=held.window, SLIDING=scoring.sliding, N=choice.tile, NE=parts.exact_tile, STAGES=choice.stages,
        MIDPOINT=held.scheme == "midpoint", WRAPS=held.wraps, MASKED=parts.masked,
        SOFTCAP=scoring.softcap != 0.0, DEPENDENT=dependent, num_warps=1, num_stages=choice.stages, **launch,
    )  # fmt: skip
    logits = scoring.sink_logits
    block, columns = tuning.combine_block(count_parts, value_dim)
    finish_kernel[(after + batch * query_heads * triton.cdiv(value_dim, columns),)](
        parts.counter, held.number, after, out_parts, weights,
        weights if logits is None else logits, out, count_parts, rows, *codes.arguments,
        COUNTED=held.count is not None, QUANTIZES=after > 0,
        HAS_LOGITS=0 if logits is None else query_heads, BLOCK=block, COLUMNS=columns,
        DEPENDENT=dependent, **codes.constants, num_warps=4, maxnreg=128,
        **launch,
    )  # fmt: skip
    return out


def _tensor_step(group: int, bits: int) -> int:
    """Words of a group's codes (of the 2-bit plane at 3 bits), padded to a tensor-core step of 16."""
    return max(16, triton.next_power_of_2(group * (2 if bits == 3 else bits) // 16))
