"""Launch choices of the kernels, measured on a Hopper GPU (benchmarks/results)."""

from __future__ import annotations

import dataclasses
import functools

import torch

TABLE_TOKENS = 64  # rows of the position table: the longest tile
SCORE_TILE = 64  # tokens of a tile of keys stored before RoPE: a tensor-core step of four warps
SCORE_RESIDENT = 48 << 10  # bytes of shared memory that a program may keep beside what it needs at once
_TURN_COLUMNS = 16  # of a leaving key, for a program after the others; before them, twice as many
_SCORE_BEGINS = 3  # tiles' time that a program spends before its first


@dataclasses.dataclass(frozen=True)
class DecodeChoice:
    """How `decode_kernel` is launched.

    Attributes:
        tile, stages: tokens of a tile, and pipeline stages.
        splits: shares of the history of a unit.
        turn_rows, turn_columns: sequences and channels of leaving keys that a program transforms.
        turns_first: whether these programs come before the others.
    """

    tile: int
    stages: int
    splits: int
    turn_rows: int
    turn_columns: int
    turns_first: bool


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_block(rows: int, few: int) -> int:
    """Rows of a program that multiplies by a layer's matrix: `few` by hand, or 16 or 64 by tensor cores."""
    if rows <= 4 * few:
        return min(few, 1 << max(0, rows - 1).bit_length())
    return 16 if rows < 1024 else 64


def query_columns(rows: int) -> int:
    """Columns of a query's matrix that a program of `step_kernel` multiplies so many rows by."""
    return 32 if rows <= 4 else 64


def step_warps(rows: int, quantizes: bool) -> int:
    """Warps of a program of `step_kernel`, which quantizes so many rows or only rotates queries."""
    return 8 if quantizes and rows == 1 else 4


def code_rows(sequences: int) -> int:
    """Sequences whose leaving token a program of `finish_kernel` quantizes."""
    return 1 if sequences <= 4 else 4


def finish_warps(block: int) -> int:
    """Warps of a program of `finish_kernel` that reads so many parts at a time."""
    return max(1, block // 64)


def combine_block(parts: int, channels: int) -> tuple[int, int]:
    """Parts and channels that a combining program of `finish_kernel` reads at a time: of few sizes, as the
    kernel is compiled for each that a growing cache comes to.
    """
    block = 16 if parts <= 16 else 64 if parts <= 64 else 256
    whole = 1 << max(0, channels - 1).bit_length()
    return block, whole if block <= 16 else min(32, whole)


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one it depends on has ended (programmatic dependent launch)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def decode_choice(
    device: torch.device,
    batch: int,
    units: int,
    capacity: int,
    rows: int,
    channels: int,
    exact_tiles: int,
    turned: int,
) -> DecodeChoice:
    """How to cover `units` of heads in each of `batch` sequences, of `capacity` slots, with programs.

    Args:
        device: that runs them.
        batch, units, capacity: as above.
        rows: query rows of a unit.
        channels: of a unit's keys or values, the larger.
        exact_tiles: programs of a unit beside those of the history.
        turned: channels of a unit's leaving key, which programs of this launch transform; 0 if they do not.
    """
    processors = _multiprocessors(device)
    wave = processors * 8  # programs that run at once, by their registers
    units_all = batch * units
    tile = 64 if rows <= 8 and channels <= 128 and units_all * capacity >= 24 * wave else 32
    if tile == 32:
        wave = processors * 12
    exact = units_all * exact_tiles
    splits = (wave - exact if 16 * exact < wave else wave) // units_all  # or history waits for exact tiles
    tiles = max(1, -(-capacity // tile))
    splits = min(splits, max(64 - exact_tiles, -(-tiles // 3)))  # or combining takes longer than it saves
    each = -(-tiles // max(1, splits))
    splits = -(-tiles // each)
    turn_rows, columns = 1 if batch <= 4 else 16, _TURN_COLUMNS
    turning = -(-batch // turn_rows) * units * -(-turned // columns)
    parts = units_all * splits + exact
    first = parts <= wave < parts + turning  # or they would be what the end waits for
    return DecodeChoice(tile, 2, splits, turn_rows, 2 * columns if first else columns, first)


@functools.cache
def score_splits(device: torch.device, units: int, capacity: int) -> int:
    """Shares of the history of each of `units` (sequences times units of heads), keys stored before RoPE:
    those that end first when as many programs run at once as their registers allow.
    """
    wave, tiles = 2 * _multiprocessors(device), max(1, -(-capacity // SCORE_TILE))
    most = min(tiles, max(1, 4 * wave // units))
    return min(range(1, most + 1), key=lambda n: -(-units * n // wave) * (-(-tiles // n) + _SCORE_BEGINS))
