"""Ops of attention over what the cache holds, and of its sink tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.ops.registry import check_equal, check_heads, check_int64, check_ranks, declare


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
    check_ranks("attend", 4, query=query, key=key, value=value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads:
        raise ConfigError(f"attend: {heads} query heads for {kv_heads} KV heads; use a multiple.")
    check_equal("attend", "heads of key and value", kv_heads, value.shape[1], "give as many values as keys")
    check_equal("attend", "channels of query and key", query.shape[3], key.shape[3], "use the same channels")
    if softcap < 0.0:
        raise ConfigError(f"attend: softcap is {softcap}; use a positive number, or 0 for none.")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(
            f"attend: mask is {mask.dtype}; use bool (True = visible) or an additive float mask."
        )
    if sink_logits is not None and tuple(sink_logits.shape) != (heads,):
        raise ConfigError(f"attend: sink_logits has shape {list(sink_logits.shape)}; use [{heads}].")


@declare(
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
    check_ranks("select_sinks", 3, residual=residual)
    if count < 1:
        raise ConfigError(f"select_sinks: count is {count}; use at least 1, or leave the op out.")
    if valid is not None:
        check_ranks("select_sinks", 2, valid=valid)
        if valid.dtype != torch.bool:
            raise ConfigError(f"select_sinks: valid is {valid.dtype}; use torch.bool.")


@declare(
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
    check_ranks("restore_sinks", 4, x=x, exact=exact)
    check_ranks("restore_sinks", 2, slots=slots)
    check_int64("restore_sinks", "slots", slots)
    check_heads("restore_sinks", x, exact)
    check_equal(
        "restore_sinks", "rows of exact and slots", exact.shape[2], slots.shape[1], "give one slot a row"
    )


@declare(
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
    check_ranks("take_tokens", 4, x=x)
    check_ranks("take_tokens", 2, slots=slots)
    check_int64("take_tokens", "slots", slots)


@declare(
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
