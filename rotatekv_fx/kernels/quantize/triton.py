"""One launch ahead of decode attention: rotate the query, store the new token, and quantize a token unless a
later launch does; or, over a prompt, quantize many tokens.

A program has one role: by its number it serves the query, the keys, the values, or the ring of recent tokens.
Rows of a tile are sequences in decode, and tokens in a prompt.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.held import Held
from rotatekv_fx.kernels.quantize.planes import (
    QUERY_TOP,
    plane_words,
    query_width,
    store_planes_of,
    wave_width,
)
from rotatekv_fx.kernels.quantize.programs import as_stored, product, quantize_program


@triton.jit
def _wait_and_pass_on(DEPENDENT: tl.constexpr):
    """Wait for all that earlier kernels write; from here on the next kernel may start."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _rotate_query(
    head, block, part, rows_total, kv_heads, query_ptr, matrix_ptr, reach_ptr, plane_ptr, wave_ptr, factor,
    REPEATS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Query rows of one KV head times its matrix [D, C + 2P], some columns of it, scaled so that none of the
    first C passes QUERY_TOP. These go to planes; the others to `wave_ptr` in fp32, [B, Hq, wave_width], where
    the next number takes the scale back.
    """
    WIDTH: tl.constexpr = C + 2 * PAIRS
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    source, column = tl.arange(0, DP), part * COLUMNS + tl.arange(0, COLUMNS)
    row = block * ROWS + tl.arange(0, ROWS)
    query_row = (row // REPEATS * kv_heads + head) * REPEATS + row % REPEATS
    inside, wide = (row < rows_total)[:, None], (column < WIDTH)[None, :]
    matrix = tl.load(
        matrix_ptr + (head * D + source)[None, :, None].to(tl.int64) * WIDTH + column[None, None, :],
        mask=(source < D)[None, :, None] & wide[None, :, :], other=0.0,
    )  # fmt: skip
    reach = tl.load(reach_ptr + head)
    _wait_and_pass_on(DEPENDENT)  # the matrix is no kernel's result
    tl.debug_barrier()  # or the compiler waits for the first load before it issues the last
    x = tl.load(
        query_ptr + query_row[:, None].to(tl.int64) * D + source[None, :],
        mask=inside & (source < D)[None, :], other=0.0,
    )  # fmt: skip
    single = x.to(tl.float32)
    most = tl.maximum(tl.sqrt(tl.sum(single * single, 1)) * reach, 1.0e-30)  # of a number in planes, at most
    scale = (1.0 / most * QUERY_TOP)[:, None]
    if ROWS <= 4:
        y = tl.sum((single * scale)[:, :, None] * matrix, 1)
    else:
        y = scale * product(x, tl.reshape(matrix, [DP, COLUMNS]), tl.zeros([ROWS, COLUMNS], tl.float32))
    query_row = query_row[:, None].to(tl.int64)
    wave_ptr += query_row * wave_width(PAIRS)
    if part == 0:
        tl.store(wave_ptr + 2 * PAIRS, most[:, None] * (factor / QUERY_TOP), mask=inside)
    if (part + 1) * COLUMNS > C:
        tl.store(wave_ptr + (column - C)[None, :], y, mask=inside & wide & (column >= C)[None, :])
    if part * COLUMNS < C:
        keep, channel = inside & (column < C)[None, :], column % GROUP
        at = plane_ptr + query_row * (C // GROUP * PLACES) + (column // GROUP * PLACES)[None, :]
        store_planes_of(y, at, channel, keep, WORDS, LOW, GROUP)
        if BITS == 3:
            store_planes_of(y * 4.0, at + 16 // LOW * WORDS, channel, keep, 16, 1, GROUP)


@triton.jit
def _store_recent(
    at, tokens, start, new_keys, new_values, ring_keys, ring_values, ring, new_tokens,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last tokens of one head's new ones, to their places in the ring."""
    channel = tl.arange(0, DP)
    skipped = new_tokens - tokens
    for t0 in range(0, tokens, BLOCK):
        token = skipped + t0 + tl.arange(0, BLOCK)
        inside = (token < new_tokens)[:, None]
        source = (at * new_tokens + token)[:, None]
        target = (at * ring + (start + token) % ring)[:, None]
        x = tl.load(new_keys + source * D + channel[None, :], mask=inside & (channel < D)[None, :], other=0.0)
        y = tl.load(
            new_values + source * DV + channel[None, :], mask=inside & (channel < DV)[None, :], other=0.0
        )
        tl.store(
            ring_keys + target * D + channel[None, :], as_stored(x, ring_keys.dtype.element_ty),
            mask=inside & (channel < D)[None, :],
        )  # fmt: skip
        tl.store(
            ring_values + target * DV + channel[None, :], as_stored(y, ring_values.dtype.element_ty),
            mask=inside & (channel < DV)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["number", "tokens", "rows_total", "new_tokens", "ring_tokens"])
def step_kernel(
    count_ptr, number, ring_tokens, quantize_programs, query_programs, query_blocks,
    query_ptr, query_matrix, reach_ptr, plane_ptr, wave_ptr, factor, kv_heads,
    key_programs, row_blocks, tokens, rows_total, new_tokens,
    new_keys, new_values, ring_keys, ring_values, ring, sink_tokens,
    key_matrix, key_mean, angle_ptr, position_ptr, position_stride,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
    key_clip, value_clip, units,
    COUNTED: tl.constexpr, QUANTIZES: tl.constexpr, REPEATS: tl.constexpr, QWORDS: tl.constexpr,
    QPLACES: tl.constexpr, QPAIRS: tl.constexpr, COLUMNS: tl.constexpr, QROWS: tl.constexpr,
    RING_BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, U: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr,
    KGROUP: tl.constexpr, VGROUP: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KBYTES: tl.constexpr, VBYTES: tl.constexpr, KWIDTH: tl.constexpr, VWIDTH: tl.constexpr,
    PAIRS: tl.constexpr, SINKS: tl.constexpr, SINKS_PADDED: tl.constexpr, MIDPOINT: tl.constexpr,
    KEYS: tl.constexpr, WRAPS: tl.constexpr, LAG: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: programs that quantize, where it QUANTIZES; query programs; programs of the ring (B * Hkv).

    New tokens are `number` ... number + new_tokens - 1 (number from `count_ptr` where COUNTED).
    """
    program = tl.program_id(0)
    if QUANTIZES:  # noqa: SIM102, a constant and a runtime condition
        if program < quantize_programs:
            _wait_and_pass_on(DEPENDENT)
            start = number
            if COUNTED:
                start = tl.load(count_ptr).to(tl.int32)
            quantize_program(
                program, start, key_programs, row_blocks, tokens, rows_total, new_tokens,
                new_keys, new_values, ring_keys, ring_values, ring, sink_tokens,
                key_matrix, key_mean, angle_ptr, position_ptr, position_stride,
                key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, capacity,
                key_clip, value_clip, units, D, DV, DP, U, KG, VG, KGROUP, VGROUP, KBITS, VBITS, KBYTES,
                VBYTES, KWIDTH, VWIDTH, PAIRS, SINKS, SINKS_PADDED, MIDPOINT, KEYS, WRAPS, LAG,
                ROWS, False,
            )  # fmt: skip
    program -= quantize_programs
    if (program >= 0) & (program < query_programs):
        parts: tl.constexpr = (KG * KGROUP + 2 * QPAIRS + COLUMNS - 1) // COLUMNS
        part, rest = program % parts, program // parts
        _rotate_query(
            rest // query_blocks, rest % query_blocks, part, rows_total // tokens * REPEATS, kv_heads,
            query_ptr, query_matrix, reach_ptr, plane_ptr, wave_ptr, factor, REPEATS, D, DP, KG * KGROUP,
            QPAIRS, KGROUP, KBITS, QWORDS, QPLACES, QROWS, COLUMNS, DEPENDENT,
        )  # fmt: skip
    elif program >= 0:
        _wait_and_pass_on(DEPENDENT)
        start = number
        if COUNTED:
            start = tl.load(count_ptr).to(tl.int32)
        _store_recent(
            (program - query_programs).to(tl.int64), ring_tokens, start,
            new_keys, new_values, ring_keys, ring_values, ring, new_tokens, D, DV, DP, RING_BLOCK,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """A launch of `quantize_program`s.

    Attributes:
        programs: how many.
        arguments, constants: of `quantize_program`, from key_programs on.
        rows: of a program.
    """

    programs: int
    arguments: tuple[object, ...]
    constants: dict[str, object]
    rows: int


def quantizing(key: Tensor, value: Tensor, held: Held, keys: str = "matrix") -> Quantizing:
    """What makes codes of as many tokens as are new: keys and values [B, Hkv, S, D], contiguous; `keys` is
    their kind, of those that `_quantize_group` names.
    """
    batch, _, new, dim = key.shape
    value_dim, capacity = value.shape[3], held.capacity
    key_groups, value_groups = held.unit_groups(key, value)
    history, sinks, position = held.history, held.sinks, held.position.contiguous()
    tokens = min(new, capacity)
    rows = tuning.row_block(batch * tokens, 1)
    if key.dtype is torch.float32:
        rows = min(rows, 16)  # larger tiles of fp32 do not fit registers
    row_blocks = triton.cdiv(batch * tokens, rows)
    key_programs = held.units * key_groups * row_blocks
    ring_keys, ring_values = held.recent or (key, value)
    sink_count = sinks[2].shape[1] if sinks else 0
    matrix, mean, _, angles = held.key_map[:4]
    arguments = (
        key_programs, row_blocks, tokens, batch * tokens, new, key, value, ring_keys, ring_values,
        ring_keys.shape[2], sinks[2] if sinks else position, matrix, mean, angles, position,
        0 if position.shape[0] == 1 else 1, *history, capacity, held.key_clip, held.value_clip, held.units,
    )  # fmt: skip
    constants = {
        "D": dim, "DV": value_dim, "DP": triton.next_power_of_2(max(dim, value_dim, 16)),
        "U": held.unit_heads(key), "KG": key_groups, "VG": value_groups,
        "KGROUP": held.key_group, "VGROUP": held.value_group,
        "KBITS": held.key_bits, "VBITS": held.value_bits,
        "KBYTES": history[0].shape[3], "VBYTES": history[3].shape[3],
        "KWIDTH": plane_width(held.key_group, held.key_bits),
        "VWIDTH": plane_width(held.value_group, held.value_bits),
        "PAIRS": 0 if keys == "ordered" else len(angles), "KEYS": keys, "SINKS": sink_count,
        "SINKS_PADDED": triton.next_power_of_2(max(1, sink_count)),
        "MIDPOINT": held.scheme == "midpoint", "WRAPS": held.wraps, "LAG": max(0, held.window - 1),
        "ROWS": rows,
    }  # fmt: skip
    programs = key_programs + held.units * value_groups * row_blocks
    return Quantizing(programs, arguments, constants, rows)


def extend(key: Tensor, value: Tensor, held: Held) -> None:
    """The op `rotatekv::extend` (`rotatekv_fx.ops` describes it): codes first, then the ring."""
    codes = quantizing(key.contiguous(), value.contiguous(), held)
    launch_step(codes, held, 0, codes.programs)  # the ring may hold what leaves
    if held.recent:
        launch_step(codes, held, min(key.shape[2], held.recent[0].shape[2]), 0)


def launch_step(
    codes: Quantizing,
    held: Held,
    ring_tokens: int,
    quantize_programs: int,
    query: Tensor | None = None,
    rotated: tuple[Tensor, Tensor] | None = None,
    factor: float = 1.0,
    dependent: bool = False,
) -> None:
    """Launch `step_kernel`: store `ring_tokens`, quantize where there are programs for it, and rotate a query
    where there is one.
    """
    key, query_matrix = codes.arguments[5], held.key_map[2]
    batch, heads, new = key.shape[:3]
    repeats = 1 if query is None else query.shape[1] // heads
    query_rows = tuning.row_block(batch * repeats, 4)
    query_blocks = triton.cdiv(batch * repeats, query_rows)
    pairs = 0 if query is None else len(held.key_map[3])
    width, columns = query_matrix.shape[-1], tuning.query_columns(query_rows)
    query_programs = 0 if query is None else heads * query_blocks * triton.cdiv(width, columns)
    programs = quantize_programs + query_programs + (batch * heads if ring_tokens else 0)
    step_kernel[(programs,)](
        held.position if held.count is None else held.count, held.number, ring_tokens, quantize_programs,
        query_programs, query_blocks, key if query is None else query, query_matrix,
        held.key_map[-1], *(rotated or (query_matrix, query_matrix)), factor, heads, *codes.arguments,
        COUNTED=held.count is not None, QUANTIZES=quantize_programs > 0, REPEATS=repeats,
        QWORDS=plane_words(held.key_group, held.key_bits),
        QPLACES=query_width(held.key_group, held.key_bits), QPAIRS=pairs, COLUMNS=columns, QROWS=query_rows,
        RING_BLOCK=1 if new == 1 else 16, DEPENDENT=dependent, **codes.constants,
        num_warps=tuning.step_warps(codes.rows, quantize_programs > 0),
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def plane_width(group: int, bits: int) -> int:
    """Bytes of a plane of codes (the 2-bit one at 3 bits), padded to a power of two."""
    return triton.next_power_of_2(group * (2 if bits == 3 else bits) // 8)
