"""Ops that rotate channels, and that turn channels into codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.compensate.reference import compensate
from rotatekv_fx.kernels.hadamard import reference as hadamard
from rotatekv_fx.kernels.quantize import reference as quantizer
from rotatekv_fx.ops.registry import check_code, check_equal, check_heads, check_int64, check_ranks, declare


def _check_rotate(x: Tensor, matrix: Tensor, order: Tensor | None, inverse: bool) -> None:
    check_ranks("rotate", 4, x=x)
    check_ranks("rotate", 3, matrix=matrix)
    channels, (count, rows, columns) = x.shape[1] * x.shape[3], matrix.shape
    if rows != columns or channels % rows or count not in (1, channels // rows):
        raise ConfigError(
            f"rotate: matrix has shape {list(matrix.shape)} for {channels} channels; use [n, m, m] with "
            "n * m channels, or [1, m, m] with m a divisor of the channels."
        )
    _check_order("rotate", order, channels)


@declare(
    "rotate(Tensor x, Tensor matrix, Tensor? order, bool inverse) -> Tensor",
    reference=hadamard.rotate,
    check=_check_rotate,
)
def _rotate(x: Tensor, matrix: Tensor, order: Tensor | None, inverse: bool) -> Tensor:
    """Multiplies blocks of a token's flattened channels by a matrix, and reorders the result.

    Forward: y = x_block @ matrix_block, then y[..., order]. Inverse: the order is undone first, then the same
    product, so the caller passes the inverted matrix (the transpose of an orthogonal one).

    Args:
        x: [B, H, S, D].
        matrix: [n, m, m] with n * m = H * D, or [1, m, m], shared by all blocks.
        order: int64 [H * D], a permutation of the flattened channels, or None.
        inverse: undo the order before the product.

    Returns:
        [B, H, S, D] in the dtype of x.

    Raises:
        ConfigError: the shapes do not fit.
    """
    return x.new_empty(x.shape)


def _check_order(op: str, order: Tensor | None, channels: int) -> None:
    if order is not None:
        check_ranks(op, 1, order=order)
        check_int64(op, "order", order)
        check_equal(op, "entries of order and channels", order.shape[0], channels, "use a permutation")


def _check_quantize(
    x: Tensor,
    bits: int,
    group: int,
    clip: float,
    scheme: str,
    order: Tensor | None = None,
    op: str = "quantize",
) -> None:
    check_ranks(op, 4, x=x)
    check_code(op, bits, group)
    channels = x.shape[1] * x.shape[3]
    if channels % group:
        raise ConfigError(f"{op}: group {group} does not divide {channels} channels; use a divisor.")
    if not x.is_floating_point():
        raise ConfigError(f"{op}: x is {x.dtype}; use a floating point tensor.")
    if not 0.0 < clip <= 1.0:
        raise ConfigError(f"{op}: clip is {clip}; use a number above 0 and at most 1.")
    if scheme not in quantizer.SCHEMES:
        raise ConfigError(f"{op}: scheme is {scheme!r}; use one of {quantizer.SCHEMES}.")
    _check_order(op, order, channels)


@declare(
    "quantize(Tensor x, int bits, int group, float clip, str scheme, Tensor? order=None) "
    "-> (Tensor codes, Tensor scale, Tensor offset)",
    reference=quantizer.quantize,
    check=_check_quantize,
)
def _quantize(
    x: Tensor, bits: int, group: int, clip: float, scheme: str, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of every group of every token.

    With top = 2^bits - 1, mid = (max + min) / 2 and half = (max - min) / 2 of a group:
        "zero_point" (RotateKV, arXiv 2501.16383): s = clip * (max - min) / top, z = round(-clip * min / s),
        q = clamp(round(x / s) + z, 0, top), and x^ = s * (q - z). A group whose values are equal, or so close
        that z leaves int16, is stored as s = |mid|, z = -sign(mid), q = 0; z = 0 where |mid| <= s / 2.
        "midpoint": lo = mid - clip * half, s = 2 * clip * half / top, q = clamp(round((x - lo) / s), 0, top),
        and x^ = lo + s * q. A group of equal values has q = 0.
    s and lo are rounded to fp16 before the codes are computed; s is never below the smallest normal fp16, and
    both stop at the largest. Rounding is half to even. A NaN spoils its own group only.

    Byte layout of a group, so that kernels unpack with masks. The group is padded with code 0 to g' channels,
    a multiple of 4, 8, 2, 1 at 2, 3, 4, 8 bits:
        2 bits: byte j holds channels j, j + g'/4, j + 2g'/4, j + 3g'/4 in its bits 0-1, 2-3, 4-5, 6-7.
        3 bits: g'/4 bytes with the low two bits of the codes, laid out as at 2 bits, then g'/8 bytes with the
        third bits: byte g'/4 + j holds that of channel j + p * g'/8 in its bit p.
        4 bits: byte j holds channel j in its low and channel j + g'/2 in its high half.
        8 bits: byte j holds channel j.

    Args:
        x: [B, H, S, D], floating point.
        bits: 2, 3, 4 or 8.
        group: consecutive flattened channels that share a scale; divides H * D into Ng groups.
        clip: share of the group's range that the codes span, in (0, 1].
        scheme: "zero_point" or "midpoint".
        order: int64 [H * D], a permutation: place p of the bytes (p // group is the group it lies with) holds
            the code of flattened channel order[p]; scales and offsets stay with the groups of channels. None
            for places that are the channels.

    Returns:
        codes: uint8 [B, Ng, S, packed_bytes(group, bits)].
        scale: fp16 [B, Ng, S].
        offset: [B, Ng, S], the zero point z as int16, or lo as fp16.

    Raises:
        ConfigError: an argument is out of range or does not fit x.
    """
    rows = (x.shape[0], x.shape[1] * x.shape[3] // group, x.shape[2])
    return (
        x.new_empty((*rows, quantizer.packed_bytes(group, bits)), dtype=torch.uint8),
        x.new_empty(rows, dtype=torch.float16),
        x.new_empty(rows, dtype=_offset_dtype(scheme)),
    )


def _check_compensate(x: Tensor, feedback: Tensor, bits: int, group: int, clip: float) -> None:
    _check_quantize(x, bits, group, clip, "midpoint", op="compensate")
    check_ranks("compensate", 3, feedback=feedback)
    channels, (count, rows, columns) = x.shape[1] * x.shape[3], feedback.shape
    if rows != columns or count * rows != channels:
        raise ConfigError(
            f"compensate: feedback has shape {list(feedback.shape)} for {channels} channels; use [n, m, m] "
            "with n * m channels."
        )


@declare(
    "compensate(Tensor x, Tensor feedback, int bits, int group, float clip) -> Tensor",
    reference=compensate,
    check=_check_compensate,
)
def _compensate(x: Tensor, feedback: Tensor, bits: int, group: int, clip: float) -> Tensor:
    """Shifts channels so that `quantize` with scheme "midpoint" chooses codes that make up for one another.

    Where an error e of a block of m channels costs e^T M e, with M = U^T D U, U unit upper triangular and D
    diagonal, that is sum_i D_i (e_i + sum_{j>i} U_ij e_j)^2. Channels are rounded from the last to the first,
    each aimed at x_i - sum_{j>i} U_ij e_j (successive cancellation, L. Babai, 1986; as used for weights by
    GPTQ, arXiv 2210.17323, and QuIP, arXiv 2307.13304). Aims stop at their group's range, and its least and
    largest value stay, so that scale and offset are those of x.

    Args:
        x: [B, H, S, D], floating point.
        feedback: U, [n, m, m] with n * m = H * D, of blocks of consecutive flattened channels.
        bits, group, clip: as given to `quantize` afterwards.

    Returns:
        fp32 [B, H, S, D].

    Raises:
        ConfigError: an argument is out of range or does not fit x.
    """
    return x.new_empty(x.shape, dtype=torch.float32)


def _offset_dtype(scheme: str) -> torch.dtype:
    return torch.int16 if scheme == "zero_point" else torch.float16


def _check_packed(op: str, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int) -> None:
    check_ranks(op, 4, codes=codes)
    check_ranks(op, 3, scale=scale, offset=offset)
    width = quantizer.packed_bytes(group, bits)
    if codes.dtype != torch.uint8 or codes.shape[3] != width:
        raise ConfigError(
            f"{op}: codes are {codes.shape[3]} x {codes.dtype} a group; use {width} x torch.uint8 for "
            f"groups of {group} at {bits} bits."
        )
    if offset.dtype not in (torch.int16, torch.float16):
        raise ConfigError(f"{op}: offset is {offset.dtype}; use torch.int16 or torch.float16.")


def _check_dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group: int,
    heads: int,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> None:
    check_code("dequantize", bits, group)
    _check_packed("dequantize", codes, scale, offset, bits, group)
    channels = codes.shape[1] * group
    if heads < 1 or channels % heads:
        raise ConfigError(f"dequantize: heads is {heads} for {channels} channels; use a divisor.")
    _check_order("dequantize", order, channels)


@declare(
    "dequantize(Tensor codes, Tensor scale, Tensor offset, int bits, int group, int heads, ScalarType dtype, "
    "Tensor? order=None) -> Tensor",
    reference=quantizer.dequantize,
    check=_check_dequantize,
)
def _dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group: int,
    heads: int,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> Tensor:
    """Values of packed groups: s * (q - z) where offset is int16, lo + s * q where it is fp16.

    Args:
        codes, scale, offset: as `quantize` returns them.
        bits, group, order: as given to `quantize`.
        heads: H.
        dtype: of the result; the arithmetic is fp32.

    Returns:
        [B, H, S, D] with D = Ng * group / H.

    Raises:
        ConfigError: the buffers do not fit `bits`, `group` and `heads`.
    """
    return codes.new_empty(
        (codes.shape[0], heads, codes.shape[2], codes.shape[1] * group // heads), dtype=dtype
    )


def check_slots(op: str, slots: Tensor, x: Tensor) -> None:
    check_ranks(op, 1, slots=slots)
    check_int64(op, "slots", slots)
    check_equal(op, "tokens of x and slots", x.shape[2], slots.shape[0], "give one slot a token")


def _check_append(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    x: Tensor,
    slots: Tensor,
    bits: int,
    group: int,
    clip: float,
    scheme: str,
    order: Tensor | None = None,
) -> None:
    _check_quantize(x, bits, group, clip, scheme, order, op="append")
    _check_packed("append", codes, scale, offset, bits, group)
    check_slots("append", slots, x)
    groups = x.shape[1] * x.shape[3] // group
    check_equal(
        "append", "groups of x and codes", groups, codes.shape[1], "allocate the buffers for these heads"
    )
    if offset.dtype != _offset_dtype(scheme):
        raise ConfigError(
            f"append: offset is {offset.dtype} for scheme {scheme!r}; use {_offset_dtype(scheme)}."
        )


@declare(
    "append(Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) offset, Tensor x, Tensor slots, "
    "int bits, int group, float clip, str scheme, Tensor? order=None) -> ()",
    reference=quantizer.append,
    check=_check_append,
)
def _append(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    x: Tensor,
    slots: Tensor,
    bits: int,
    group: int,
    clip: float,
    scheme: str,
    order: Tensor | None = None,
) -> None:
    """Quantizes tokens into their slots of packed buffers, in place; other slots stay as they are.

    Args:
        codes: uint8 [B, Ng, N, packed_bytes(group, bits)], a buffer of N slots.
        scale, offset: its scales and offsets, [B, Ng, N].
        x: [B, H, S, D].
        slots: int64 [S], distinct, each in [0, N).
        bits, group, clip, scheme, order: as in `quantize`.

    Raises:
        ConfigError: the buffers, x and slots do not fit.
    """


def _check_store(buffer: Tensor, x: Tensor, slots: Tensor) -> None:
    check_ranks("store", 4, buffer=buffer, x=x)
    check_slots("store", slots, x)
    check_heads("store", x, buffer)


@declare(
    "store(Tensor(a!) buffer, Tensor x, Tensor slots) -> ()",
    reference=quantizer.store,
    check=_check_store,
)
def _store(buffer: Tensor, x: Tensor, slots: Tensor) -> None:
    """Writes tokens unchanged into their slots of a buffer, in place: the identity codec.

    Args:
        buffer: [B, H, N, D]; x is cast to its dtype.
        x: [B, H, S, D].
        slots: int64 [S], distinct, each in [0, N).

    Raises:
        ConfigError: x and slots do not fit.
    """
