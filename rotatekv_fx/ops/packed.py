"""Ops that work on a layer's packed tensors: attend to them with one new token, and add many tokens.

Their tensors come in groups, as a cache layer holds them (N slots, Ng groups of `key_group` channels):

* history: key codes uint8 [B, Ng, N, bytes], key scale fp16 [B, Ng, N], key offset (fp16, or int16 zero
  points) [B, Ng, N], and the same three for values. Token n is in slot n, or n % N where it `wraps`. A
  negative key scale hides a token's codes: it is a sink. With a window, its oldest token has codes already,
  which the next step reads; every op expects and leaves them.
* recent: exact keys and values [B, Hkv, ring, D], token n in slot n % ring; none without a window.
* sinks: exact keys and values [B, Hkv, count, D] and their tokens int32 [B, count], -1 where unused; or none.
* key_map: how keys become channels of codes (`rotatekv_fx.cache.keymap`), for units of heads that share
  rotations and quantization groups, C channels each, and P pairs of channels whose mean was removed:
  matrix fp32 [units, C, C], mean fp32 [units, 2P, C], rotation fp32 [Hkv, D, C + 2P], angles fp64 [P],
  table fp16 [tile, 2P]. A key at position p is stored as y = k @ matrix - [cos(p t), sin(p t)] @ mean; its
  score with a query q is (q @ rotation) . [y, cos(p t), sin(p t)].

Positions of a sequence's tokens are taken to be consecutive: position - number is that of the newest token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.kernels.prefill import reference as prompts
from rotatekv_fx.ops.registry import check_code, check_equal, check_ranks, declare

_GROUPS = (
    "Tensor key, Tensor value, Tensor(a!)[] history, Tensor(b!)[] recent, Tensor[] sinks, Tensor[] key_map, "
    "Tensor position, "
)
_QUANTIZERS = (
    "int key_bits, int value_bits, int key_group, int value_group, float key_clip, float value_clip, "
    "str scheme, int window, "
)


def _check_packed_layer(
    op: str,
    key: Tensor,
    value: Tensor,
    history: list[Tensor],
    recent: list[Tensor],
    sinks: list[Tensor],
    key_map: list[Tensor],
    position: Tensor,
    bits: tuple[int, int],
    groups: tuple[int, int],
    window: int,
) -> None:
    check_ranks(op, 4, key=key, value=value)
    check_ranks(op, 2, position=position)
    for name, given, counts in (
        ("history", history, (6,)),
        ("recent", recent, (2,) if window else (0,)),
        ("sinks", sinks, (0, 3)),
        ("key_map", key_map, (5,)),
    ):
        if len(given) not in counts:
            raise ConfigError(f"{op}: {name} has {len(given)} tensors; use {counts[-1]}.")
    for one_bits, group, x, codes in zip(bits, groups, (key, value), history[::3], strict=True):
        check_code(op, one_bits, group)
        channels = x.shape[1] * x.shape[3]
        if channels % group:
            raise ConfigError(f"{op}: group {group} does not divide {channels} channels; use a divisor.")
        check_equal(op, "groups of channels and codes", channels // group, codes.shape[1], "use one buffer")
    if recent and recent[0].shape[2] <= window:
        raise ConfigError(
            f"{op}: the ring has {recent[0].shape[2]} slots for a window of {window}; use at least one more."
        )


def _check_decode(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    history, recent, sinks, key_map, position, mask = rest[:6]
    key_bits, value_bits, key_group, value_group = rest[9:13]
    check_ranks("decode", 4, query=query)
    _check_packed_layer(
        "decode", key, value, history, recent, sinks, key_map, position,
        (key_bits, value_bits), (key_group, value_group), rest[16],
    )  # fmt: skip
    if query.shape[2] != 1 or key.shape[2] != 1:
        raise ConfigError(f"decode: {query.shape[2]} queries, {key.shape[2]} keys; give one new token.")
    if query.shape[1] % key.shape[1]:
        raise ConfigError(
            f"decode: {query.shape[1]} query heads for {key.shape[1]} KV heads; use a multiple."
        )
    if mask is not None:
        check_ranks("decode", 2, mask=mask)


@declare(
    "decode(Tensor query, " + _GROUPS + "Tensor? mask, Tensor? count, SymInt number, SymInt mask_offset, "
    + _QUANTIZERS + "int sliding, bool wraps, float scale, float softcap, Tensor? sink_logits) -> Tensor",
    reference=attention.decode,
    check=_check_decode,
)  # fmt: skip
def _decode(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Attention of one new token over a packed layer, to which the token is added first.

    The token that leaves the window at the next step becomes codes, in place; without a window, the new token
    itself does.

    Args:
        query: [B, Hq, 1, D], after RoPE.
        key, value: [B, Hkv, 1, D] of the new token, after RoPE.
        history, recent, sinks, key_map: the layer's tensors (module docstring); history and recent change.
        position: position id of the new token, [B or 1, 1].
        mask: bool [B or 1, columns], False hides a token; column c is that of token mask_offset + c. None
            shows all.
        count: int64 [], tokens in the cache before this one, read on the device; None takes `number`.
        number: the same on the host.
        key_bits, value_bits, key_group, value_group, key_clip, value_clip, scheme: as in op `quantize`.
        window: tokens that are read exactly, the new one included.
        sliding: tokens that the attention sees, the new one included; 0 for all.
        wraps: whether the history is a ring.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        sink_logits: [Hq], one more logit in each denominator, or None.

    Returns:
        [B, 1, Hq, Dv] in the dtype of the query.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))


def _check_extend(key: Tensor, value: Tensor, *rest: Any) -> None:
    history, recent, sinks, key_map, position = rest[:5]
    key_bits, value_bits, key_group, value_group = rest[7:11]
    _check_packed_layer(
        "extend", key, value, history, recent, sinks, key_map, position,
        (key_bits, value_bits), (key_group, value_group), rest[14],
    )  # fmt: skip


@declare(
    "extend(" + _GROUPS + "Tensor? count, SymInt number, " + _QUANTIZERS + "bool wraps) -> ()",
    reference=attention.extend,
    check=_check_extend,
)
def _extend(key: Tensor, value: Tensor, *rest: Any) -> None:
    """Adds new tokens to a packed layer, in place: what leaves the window then or next becomes codes.

    Args:
        key, value: [B, Hkv, S, D] of the new tokens, after RoPE.
        position: position id of the last of them, [B or 1, 1].
        others: as in op `decode`.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """


def _check_prefill(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    history, recent, sinks, key_map, position = rest[:5]
    key_bits, value_bits, key_group, value_group = rest[6:10]
    check_ranks("prefill", 4, query=query)
    _check_packed_layer(
        "prefill", key, value, history, recent, sinks, key_map, position,
        (key_bits, value_bits), (key_group, value_group), rest[13],
    )  # fmt: skip
    check_equal("prefill", "tokens of query and key", query.shape[2], key.shape[2], "give the new tokens")


@declare(
    "prefill(Tensor query, " + _GROUPS + "SymInt number, " + _QUANTIZERS + "float scale) -> Tensor",
    reference=prompts.prefill,
    check=_check_prefill,
)
def _prefill(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Causal attention of new tokens over a packed layer, to which they are added as by `extend`.

    Query i reads token j in its exact form where j > i - window, and through its codes elsewhere; sinks are
    exact.

    Args:
        query: [B, Hq, S, D], after RoPE.
        position: position id of the last new token, [B or 1, 1].
        number: tokens in the cache before these.
        others: as in op `decode`; the history does not wrap.

    Returns:
        [B, S, Hq, Dv] in the dtype of the query.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
