"""The ops of the namespace `rotatekv`: schema, shapes, checks, and what runs them on each device.

Every op ignores autocast, leaves the host alone (no synchronisation, no Python that depends on data), and is
for inference: its results carry no gradient. CPU tensors run the plain torch reference; CUDA tensors run the
Triton kernel named in `TRITON_KERNELS`, or the reference where none is named. `lowered_to` says which.

Shapes use B sequences, S tokens, N cache slots, H heads of D channels. "Flattened channels" of a token are
head-major: channel h * D + d.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rotatekv_fx.config import SUPPORTED_BITS
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.kernels.compensate.reference import compensate
from rotatekv_fx.kernels.hadamard import reference as hadamard
from rotatekv_fx.kernels.quantize import reference as quantizer

# Op name -> "module:function" of the Triton kernel that CUDA tensors run; imported inside the first call.
TRITON_KERNELS: dict[str, str] = {}

_REFERENCES: dict[str, Callable[..., Any]] = {}


def lowered_to(op_name: str, device_type: str) -> str:
    """What runs an op on a device: "triton" or "reference".

    Args:
        op_name: name without namespace, such as "rotate".
        device_type: `torch.device.type`, such as "cpu" or "cuda".

    Raises:
        ConfigError: there is no such op.
    """
    if op_name not in _REFERENCES:
        raise ConfigError(f"there is no op {op_name!r}; use one of {sorted(_REFERENCES)}.")
    return "triton" if device_type == "cuda" and op_name in TRITON_KERNELS else "reference"


def _implementation(op_name: str, device_type: str) -> Callable[..., Any]:
    if lowered_to(op_name, device_type) == "reference":
        return _REFERENCES[op_name]
    module, _, function = TRITON_KERNELS[op_name].partition(":")
    return getattr(importlib.import_module(module), function)


def _declare(
    signature: str, reference: Callable[..., Any], check: Callable[..., None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an op; the decorated function is its fake (shapes and dtypes only) and documents it.

    `check` sees the arguments before the fake and before every implementation.
    """
    name, _, arguments = signature.partition("(")
    qualified = f"rotatekv::{name}"

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        def run_on(device_type: str) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                check(*args)
                function = _implementation(name, device_type)
                if torch.is_grad_enabled() or torch.is_autocast_enabled(device_type):
                    with torch.no_grad(), torch.autocast(device_type, enabled=False):
                        return function(*args)
                return function(*args)

            return run

        _REFERENCES[name] = reference
        torch.library.define(qualified, "(" + arguments)
        torch.library.register_fake(qualified, checked_fake)
        for device_type in ("cpu", "cuda"):
            torch.library.impl(qualified, device_type, run_on(device_type))
        return fake

    return register


def _check_ranks(op: str, rank: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ConfigError(f"{op}: {name} has shape {list(tensor.shape)}; use {rank} dimensions.")


def _check_equal(op: str, what: str, first: int, second: int, remedy: str) -> None:
    if first != second:
        raise ConfigError(f"{op}: the {what} are {first} and {second}; {remedy}.")


def _check_int64(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise ConfigError(f"{op}: {name} is {tensor.dtype}; use torch.int64.")


def _check_rotate(x: Tensor, matrix: Tensor, order: Tensor | None, inverse: bool) -> None:
    _check_ranks("rotate", 4, x=x)
    _check_ranks("rotate", 3, matrix=matrix)
    channels, (count, rows, columns) = x.shape[1] * x.shape[3], matrix.shape
    if rows != columns or channels % rows or count not in (1, channels // rows):
        raise ConfigError(
            f"rotate: matrix has shape {list(matrix.shape)} for {channels} channels; use [n, m, m] with "
            "n * m channels, or [1, m, m] with m a divisor of the channels."
        )
    if order is not None:
        _check_ranks("rotate", 1, order=order)
        _check_int64("rotate", "order", order)
        _check_equal("rotate", "entries of order and channels", order.shape[0], channels, "use a permutation")


@_declare(
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


def _check_code(op: str, bits: int, group: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ConfigError(f"{op}: bits is {bits}; use one of {SUPPORTED_BITS}.")
    if group < 1:
        raise ConfigError(f"{op}: group is {group}; use a whole number of at least 1.")


def _check_quantize(x: Tensor, bits: int, group: int, clip: float, scheme: str, op: str = "quantize") -> None:
    _check_ranks(op, 4, x=x)
    _check_code(op, bits, group)
    channels = x.shape[1] * x.shape[3]
    if channels % group:
        raise ConfigError(f"{op}: group {group} does not divide {channels} channels; use a divisor.")
    if not x.is_floating_point():
        raise ConfigError(f"{op}: x is {x.dtype}; use a floating point tensor.")
    if not 0.0 < clip <= 1.0:
        raise ConfigError(f"{op}: clip is {clip}; use a number above 0 and at most 1.")
    if scheme not in quantizer.SCHEMES:
        raise ConfigError(f"{op}: scheme is {scheme!r}; use one of {quantizer.SCHEMES}.")


@_declare(
    "quantize(Tensor x, int bits, int group, float clip, str scheme) "
    "-> (Tensor codes, Tensor scale, Tensor offset)",
    reference=quantizer.quantize,
    check=_check_quantize,
)
def _quantize(x: Tensor, bits: int, group: int, clip: float, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
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
    _check_ranks("compensate", 3, feedback=feedback)
    channels, (count, rows, columns) = x.shape[1] * x.shape[3], feedback.shape
    if rows != columns or count * rows != channels:
        raise ConfigError(
            f"compensate: feedback has shape {list(feedback.shape)} for {channels} channels; use [n, m, m] "
            "with n * m channels."
        )


@_declare(
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
    _check_ranks(op, 4, codes=codes)
    _check_ranks(op, 3, scale=scale, offset=offset)
    width = quantizer.packed_bytes(group, bits)
    if codes.dtype != torch.uint8 or codes.shape[3] != width:
        raise ConfigError(
            f"{op}: codes are {codes.shape[3]} x {codes.dtype} a group; use {width} x torch.uint8 for "
            f"groups of {group} at {bits} bits."
        )
    if offset.dtype not in (torch.int16, torch.float16):
        raise ConfigError(f"{op}: offset is {offset.dtype}; use torch.int16 or torch.float16.")


def _check_dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, heads: int, dtype: torch.dtype
) -> None:
    _check_code("dequantize", bits, group)
    _check_packed("dequantize", codes, scale, offset, bits, group)
    channels = codes.shape[1] * group
    if heads < 1 or channels % heads:
        raise ConfigError(f"dequantize: heads is {heads} for {channels} channels; use a divisor.")


@_declare(
    "dequantize(Tensor codes, Tensor scale, Tensor offset, int bits, int group, int heads, ScalarType dtype) "
    "-> Tensor",
    reference=quantizer.dequantize,
    check=_check_dequantize,
)
def _dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, heads: int, dtype: torch.dtype
) -> Tensor:
    """Values of packed groups: s * (q - z) where offset is int16, lo + s * q where it is fp16.

    Args:
        codes, scale, offset: as `quantize` returns them.
        bits, group: as given to `quantize`.
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


def _check_slots(op: str, slots: Tensor, x: Tensor) -> None:
    _check_ranks(op, 1, slots=slots)
    _check_int64(op, "slots", slots)
    _check_equal(op, "tokens of x and slots", x.shape[2], slots.shape[0], "give one slot a token")


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
) -> None:
    _check_quantize(x, bits, group, clip, scheme, op="append")
    _check_packed("append", codes, scale, offset, bits, group)
    _check_slots("append", slots, x)
    groups = x.shape[1] * x.shape[3] // group
    _check_equal(
        "append", "groups of x and codes", groups, codes.shape[1], "allocate the buffers for these heads"
    )
    if offset.dtype != _offset_dtype(scheme):
        raise ConfigError(
            f"append: offset is {offset.dtype} for scheme {scheme!r}; use {_offset_dtype(scheme)}."
        )


@_declare(
    "append(Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) offset, Tensor x, Tensor slots, "
    "int bits, int group, float clip, str scheme) -> ()",
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
) -> None:
    """Quantizes tokens into their slots of packed buffers, in place; other slots stay as they are.

    Args:
        codes: uint8 [B, Ng, N, packed_bytes(group, bits)], a buffer of N slots.
        scale, offset: its scales and offsets, [B, Ng, N].
        x: [B, H, S, D].
        slots: int64 [S], distinct, each in [0, N).
        bits, group, clip, scheme: as in `quantize`.

    Raises:
        ConfigError: the buffers, x and slots do not fit.
    """


def _check_heads(op: str, x: Tensor, other: Tensor) -> None:
    _check_equal(op, "heads of both tensors", x.shape[1], other.shape[1], "use the same heads")
    _check_equal(op, "channels of both tensors", x.shape[3], other.shape[3], "use the same channels")


def _check_store(buffer: Tensor, x: Tensor, slots: Tensor) -> None:
    _check_ranks("store", 4, buffer=buffer, x=x)
    _check_slots("store", slots, x)
    _check_heads("store", x, buffer)


@_declare(
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


def _check_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    causal: bool,
) -> None:
    _check_ranks("attend", 4, query=query, key=key, value=value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads:
        raise ConfigError(f"attend: {heads} query heads for {kv_heads} KV heads; use a multiple.")
    _check_equal("attend", "heads of key and value", kv_heads, value.shape[1], "give as many values as keys")
    _check_equal("attend", "channels of query and key", query.shape[3], key.shape[3], "use the same channels")
    if softcap < 0.0:
        raise ConfigError(f"attend: softcap is {softcap}; use a positive number, or 0 for none.")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(
            f"attend: mask is {mask.dtype}; use bool (True = visible) or an additive float mask."
        )
    if sink_logits is not None and tuple(sink_logits.shape) != (heads,):
        raise ConfigError(f"attend: sink_logits has shape {list(sink_logits.shape)}; use [{heads}].")


@_declare(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap, "
    "Tensor? sink_logits, bool causal) -> Tensor",
    reference=attention.attend,
    check=_check_attend,
)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    causal: bool,
) -> Tensor:
    """Softmax attention; query head h reads KV head h // (Hq / Hkv).

    Without soft-cap and sink logits the reference is `scaled_dot_product_attention` in the dtype of query,
    the numbers of the model's own path; with them it is an explicit fp32 softmax. Keys and values must be
    finite at hidden slots too.

    Args:
        query: [B, Hq, S, D].
        key: [B, Hkv, N, D], cast to the dtype of query.
        value: [B, Hkv, N, Dv], cast likewise.
        mask: bool (True = visible) or additive, broadcastable to [B, Hq, S, N]; a longer last dimension is
            cut to N. A query that sees no key gets 0.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap) before the mask; 0 turns it off.
        sink_logits: [Hq], one more logit a head in the softmax, which carries no value; or None.
        causal: where mask is None, query i sees keys j <= i + N - S.

    Returns:
        [B, S, Hq, Dv] in the dtype of query.

    Raises:
        ConfigError: the shapes do not fit, or softcap is negative.
    """
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def _check_select_sinks(residual: Tensor, valid: Tensor | None, count: int) -> None:
    _check_ranks("select_sinks", 3, residual=residual)
    if count < 1:
        raise ConfigError(f"select_sinks: count is {count}; use at least 1, or leave the op out.")
    if valid is not None:
        _check_ranks("select_sinks", 2, valid=valid)
        if valid.dtype != torch.bool:
            raise ConfigError(f"select_sinks: valid is {valid.dtype}; use torch.bool.")


@_declare(
    "select_sinks(Tensor residual, Tensor? valid, int count) -> (Tensor scores, Tensor tokens)",
    reference=attention.select_sinks,
    check=_check_select_sinks,
)
def _select_sinks(residual: Tensor, valid: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The tokens that own the largest |values| of a block's input (RotateKV, arXiv 2501.16383).

    Args:
        residual: [B, S, C], the input of the decoder block.
        valid: bool [B, S], False for padding, which is never chosen; or None.
        count: values to look for in each sequence.

    Returns:
        scores: fp32 [B, count], |value|, descending; -1 where the sequence holds no further value.
        tokens: int64 [B, count], the token of each; a token may come several times; 0 where the score is -1;
            which of equal values comes first, or at all, is the device's choice.

    Raises:
        ConfigError: an argument is out of range.
    """
    shape = (residual.shape[0], count)
    return residual.new_empty(shape, dtype=torch.float32), residual.new_empty(shape, dtype=torch.int64)


def _check_restore_sinks(x: Tensor, exact: Tensor, slots: Tensor) -> None:
    _check_ranks("restore_sinks", 4, x=x, exact=exact)
    _check_ranks("restore_sinks", 2, slots=slots)
    _check_int64("restore_sinks", "slots", slots)
    _check_heads("restore_sinks", x, exact)
    _check_equal(
        "restore_sinks", "rows of exact and slots", exact.shape[2], slots.shape[1], "give one slot a row"
    )


@_declare(
    "restore_sinks(Tensor x, Tensor exact, Tensor slots) -> Tensor",
    reference=attention.restore_sinks,
    check=_check_restore_sinks,
)
def _restore_sinks(x: Tensor, exact: Tensor, slots: Tensor) -> Tensor:
    """A copy of x in which the sink tokens have their exact rows.

    Args:
        x: [B, H, N, D].
        exact: [B, H, count, D], cast to the dtype of x.
        slots: int64 [B, count], the row of x that each replaces; one outside [0, N) changes nothing. Rows
            for a slot that is given twice must be equal.

    Returns:
        [B, H, N, D] in the dtype of x.

    Raises:
        ConfigError: the shapes do not fit.
    """
    return x.new_empty(x.shape)


def _check_take_tokens(x: Tensor, slots: Tensor) -> None:
    _check_ranks("take_tokens", 4, x=x)
    _check_ranks("take_tokens", 2, slots=slots)
    _check_int64("take_tokens", "slots", slots)


@_declare(
    "take_tokens(Tensor x, Tensor slots) -> Tensor",
    reference=attention.take_tokens,
    check=_check_take_tokens,
)
def _take_tokens(x: Tensor, slots: Tensor) -> Tensor:
    """The rows of x at token slots, each sequence its own.

    Args:
        x: [B, H, N, D].
        slots: int64 [B, count], each in [0, N).

    Returns:
        [B, H, count, D] in the dtype of x.

    Raises:
        ConfigError: the shapes do not fit.
    """
    return x.new_empty((x.shape[0], x.shape[1], slots.shape[1], x.shape[3]))
