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
  table fp16 [tile, 2P], reach fp32 [Hkv], at least the norm of each of rotation's first C columns. A key at
  position p is stored as y = k @ matrix - [cos(p t), sin(p t)] @ mean; its score with a query q is
  (q @ rotation) . [y, cos(p t), sin(p t)].

`decode_before_rope` has a key_map of its own, for keys that are stored before RoPE, rotated over G
neighbouring heads and reordered over all channels. Their codes lie in places that know of no reordering: a
head's places are its rotated channels, or those with two bits of their numbers exchanged, so that the
channels that RoPE turns together, rotated back, are in places i and i ^ 1. order int32 [1, Hkv * D] is the
stored channel of each place (`order` of the op `quantize`); matrix fp32 [D, D], a Walsh-Hadamard one times a
power of two, and mixing fp32 [G, G] undo the rotation by their Kronecker product mixing x matrix; axis int32
[2, D] is the channel of each place after that, and its partner; size fp32 [D], angles fp64 [D], and table
fp16 [tile, D], a tile's cosines and sines in even places, are RoPE. With k the key rotated back and q the
query, both in places, a score is the sum over i of size_i k_i (q_i cos(p t_i) - q_i' sin(p t_i)), i' the
partner's place, where size_i' = size_i and t_i' = -t_i. If no exchange of bits brings partners together,
places are channels, and table is [tile, 2 D], of all of them.

Positions of a sequence's tokens are taken to be consecutive: position - number is that of the newest token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.kernels.held import Held, Scoring, arguments_of_decoding, arguments_with_held
from rotatekv_fx.kernels.prefill import reference as prompts
from rotatekv_fx.ops.registry import check_code, check_equal, check_ranks, declare

_HELD = (
    "Tensor(a!)[] history, Tensor(b!)[] recent, Tensor[] sinks, Tensor[] key_map, Tensor position, "
    "Tensor? count, SymInt number, int key_bits, int value_bits, int key_group, int value_group, "
    "float key_clip, float value_clip, str scheme, int window, bool wraps"
)
_AFTER_KEY_AND_VALUE = functools.partial(arguments_with_held, 2)
_AFTER_QUERY = functools.partial(arguments_with_held, 3)


def _check_held(op: str, key: Tensor, value: Tensor, held: Held, key_map: int = 6) -> None:
    check_ranks(op, 4, key=key, value=value)
    check_ranks(op, 2, position=held.position)
    for name, given, counts in (
        ("history", held.history, (6,)),
        ("recent", held.recent, (2,) if held.window else (0,)),
        ("sinks", held.sinks, (0, 3)),
        ("key_map", held.key_map, (key_map,)),
    ):
        if len(given) not in counts:
            raise ConfigError(f"{op}: {name} has {len(given)} tensors; use {counts[-1]}.")
    sides = (held.key_bits, held.key_group, key), (held.value_bits, held.value_group, value)
    for (bits, group, x), codes in zip(sides, held.history[::3], strict=True):
        check_code(op, bits, group)
        channels = x.shape[1] * x.shape[3]
        if channels % group:
            raise ConfigError(f"{op}: group {group} does not divide {channels} channels; use a divisor.")
        check_equal(op, "groups of channels and codes", channels // group, codes.shape[1], "use one buffer")
    if held.recent and held.recent[0].shape[2] <= held.window:
        raise ConfigError(
            f"{op}: the ring has {held.recent[0].shape[2]} slots for a window of {held.window}; use at least "
            "one more."
        )


def _check_decode(
    op: str, maps: int, query: Tensor, key: Tensor, value: Tensor, held: Held, scoring: Scoring
) -> None:
    check_ranks(op, 4, query=query)
    _check_held(op, key, value, held, maps)
    if query.shape[2] != 1 or key.shape[2] != 1:
        raise ConfigError(f"{op}: {query.shape[2]} queries, {key.shape[2]} keys; give one new token.")
    if query.shape[1] % key.shape[1]:
        raise ConfigError(f"{op}: {query.shape[1]} query heads for {key.shape[1]} KV heads; use a multiple.")
    if scoring.mask is not None:
        check_ranks(op, 2, mask=scoring.mask)
        if not (scoring.mask.dtype is torch.bool or scoring.mask.is_floating_point()):
            raise ConfigError(f"{op}: the mask is {scoring.mask.dtype}; use torch.bool or a floating dtype.")


_DECODE = (
    f"(Tensor query, Tensor key, Tensor value, {_HELD}, Tensor? mask, SymInt mask_offset, int sliding, "
    "float scale, float softcap, Tensor? sink_logits) -> Tensor"
)


@declare(
    f"decode{_DECODE}",
    reference=attention.decode,
    check=functools.partial(_check_decode, "decode", 6),
    gather=arguments_of_decoding,
)
def _decode(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Attention of one new token over a packed layer, to which the token is added first.

    The token that leaves the window at the next step becomes codes, in place; without a window, the new token
    itself does.

    Args:
        query: [B, Hq, 1, D], after RoPE.
        key, value: [B, Hkv, 1, D] of the new token, after RoPE.
        history, recent, sinks, key_map: the layer's tensors (module docstring); history and recent change.
        position: position id of the new token, [B or 1, 1].
        count: int64 [], tokens in the cache before this one, read on the device; None takes `number`.
        number: the same on the host.
        key_bits, value_bits, key_group, value_group, key_clip, value_clip, scheme: as in op `quantize`.
        window: tokens that are read exactly, the new one included.
        wraps: whether the history is a ring.
        mask: [B or 1, columns]; bool, where False hides a token; or floating, which is added to the scores,
            and hides a token where it is at most half the least number of its dtype. Column c is that of
            token mask_offset + c. None shows all.
        sliding: tokens that the attention sees, the new one included; 0 for all.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        sink_logits: [Hq], one more logit in each denominator, or None.

    Returns:
        [B, 1, Hq, Dv] in the dtype of the query.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))


@declare(
    f"decode_before_rope{_DECODE}",
    reference=attention.decode_before_rope,
    check=functools.partial(_check_decode, "decode_before_rope", 7),
    gather=arguments_of_decoding,
)
def _decode_before_rope(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Attention of one new token over a packed layer whose keys are stored before RoPE.

    Args:
        query: [B, Hq, 1, D], after RoPE.
        key, value: [B, Hkv, 1, D] of the new token, in the form that is stored: rotated, reordered, before
            RoPE.
        history, recent, sinks: keys are in the same form.
        key_map: of its own (module docstring).
        others: as in op `decode`.

    Returns:
        [B, 1, Hq, Dv] in the dtype of the query.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))


@declare(
    f"extend(Tensor key, Tensor value, {_HELD}) -> ()",
    reference=attention.extend,
    check=functools.partial(_check_held, "extend"),
    gather=_AFTER_KEY_AND_VALUE,
)
def _extend(key: Tensor, value: Tensor, held: Held) -> None:
    """Adds new tokens to a packed layer, in place: what leaves the window then or next becomes codes.

    Args:
        key, value: [B, Hkv, S, D] of the new tokens, after RoPE.
        position: position id of the last of them, [B or 1, 1].
        others: as in op `decode`.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """


def _check_prefill(query: Tensor, key: Tensor, value: Tensor, held: Held, scale: float) -> None:
    check_ranks("prefill", 4, query=query)
    _check_held("prefill", key, value, held)
    check_equal("prefill", "tokens of query and key", query.shape[2], key.shape[2], "give the new tokens")
    if held.wraps or held.count is not None:
        raise ConfigError("prefill: the history wraps, or tokens are counted on the device; use `extend`.")


@declare(
    f"prefill(Tensor query, Tensor key, Tensor value, {_HELD}, float scale) -> Tensor",
    reference=prompts.prefill,
    check=_check_prefill,
    gather=_AFTER_QUERY,
)
def _prefill(query: Tensor, key: Tensor, value: Tensor, held: Held, scale: float) -> Tensor:
    """Causal attention of new tokens over a packed layer, to which they are added as by `extend`.

    Query i reads token j in its exact form where j > i - window, and through its codes elsewhere; sinks are
    exact.

    Args:
        query: [B, Hq, S, D], after RoPE.
        position: position id of the last new token, [B or 1, 1].
        number: tokens in the cache before these; `count` is None.
        others: as in op `decode`; the history does not wrap.

    Returns:
        [B, S, Hq, Dv] in the dtype of the query.

    Raises:
        ConfigError: shapes, bits or groups do not fit.
    """
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
