"""The packed cache of one layer as plain tensors, and what a step does to it.

Old tokens ("history") are codes, with the token axis first, so that a step's new rows can be written behind
the old ones in one buffer. The last `window` tokens ("recent") and the sinks are exact. What a query reads:

    history and tokens that leave the window (codes) | sinks | recent and new tokens (exact)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rotatekv_fx.cache.codec import Codec, as_exact
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.kernels.quantize import reference as quantizer

State = dict[str, Tensor]
SIDES = ("key", "value")
PARTS = ("codes", "scale", "offset", "exact")
SINKS = ("sink_scores", "sink_tokens", "sink_keys", "sink_values")


@dataclasses.dataclass(frozen=True)
class Step:
    """What all layers of a step share.

    Attributes:
        tokens: T, tokens with the new ones.
        new: S, new tokens.
        position_ids: [B, T].
        prompt: bool [], whether new tokens may become sinks.
        several: bool [], whether there is more than one.
        leaving, staying: int64, places among recent and new tokens of those that are quantized, and of those
            that stay exact; None without a window.
        memo: what layers have in common.
    """

    tokens: int
    new: int
    position_ids: Tensor
    prompt: Tensor
    several: Tensor
    leaving: Tensor | None
    staying: Tensor | None
    memo: dict[tuple[object, ...], Tensor]


def history_names(codec: Codec, side: str) -> tuple[str, ...]:
    """Names of a side's history tensors, such as "key_codes"."""
    return tuple(f"{side}_{part}" for part in (PARTS[-1:] if codec.quantizer is None else PARTS[:-1]))


def encode(codec: Codec, x: Tensor) -> tuple[Tensor, ...]:
    """[B, H, S, D] -> what is stored, as `Side.parts`."""
    q = codec.quantizer
    return (x,) if q is None else quantizer.quantize(x, q.bits, q.group, q.clip, q.scheme)


def decode(codec: Codec, parts: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `encode`."""
    q = codec.quantizer
    if q is None:
        return parts[0]
    return quantizer.dequantize(*parts, q.bits, q.group, codec.heads, codec.dtype)


def base_of(codec: Codec, parts: tuple[Tensor, ...]) -> Tensor:
    """Value of code 0 in each group, fp32 [B, Ng, N]."""
    scale, offset = parts[1].float(), parts[2].float()
    return -scale * offset if codec.quantizer.scheme == "zero_point" else offset


def side_of(tensors: State, side: str) -> tuple[Tensor, ...]:
    """The parts of "key" or "value" among `tensors`."""
    return tuple(tensors[f"{side}_{part}"] for part in PARTS if f"{side}_{part}" in tensors)


def push(codec: Codec, side: str, state: State, x: Tensor, new: State) -> State:
    """Quantize tokens [B, H, E, D] and put them behind the history.

    Args:
        new: receives the rows, tokens first.

    Returns:
        All rows by name, tokens at axis 2.
    """
    joined = {}
    for name, part in zip(history_names(codec, side), encode(codec, x), strict=True):
        new[name] = part.movedim(2, 0).contiguous()
        joined[name] = torch.cat([state[name], new[name]]).movedim(0, 2)
    return joined


def chosen_sinks(count: int, t: State) -> tuple[Tensor, ...]:
    """The sinks after a step: owners of the largest |values| of the block's input over the prompt.

    Args:
        t: the tensors named in SINKS: sink_scores [B, count], sink_tokens int32 [B, count] (-1 for an unused
            slot, or one whose token has another), sink_keys and sink_values [B, Hkv, count, D]; and
            residual [B, S, C], own bool [B or 1, S] (False for padding), key and value [B, Hkv, S, D], exact;
            first int64 [1], number of the first new token.
    """
    scores, tokens, *stores = (t[name] for name in SINKS)
    found, local = attention.select_sinks(t["residual"], t["own"], count)
    best = torch.cat([scores, found], 1).topk(count, 1)
    numbers = torch.cat([tokens, torch.where(found < 0, -1, local + t["first"]).int()], 1)
    numbers = numbers.gather(1, best.indices)
    earlier = torch.ones(count, count, dtype=torch.bool, device=numbers.device).tril(-1)
    again = ((numbers[:, :, None] == numbers[:, None]) & earlier).any(-1)
    rows = []
    for store, x in zip(stores, (t["key"], t["value"]), strict=True):
        both = torch.cat([store, as_exact(attention.take_tokens(x, local), store.dtype)], 2)
        rows.append(attention.take_tokens(both, best.indices))
    return best.values, torch.where(again, -1, numbers), *rows


def kept_sinks(count: int, t: State) -> tuple[Tensor, ...]:
    """The sinks as they were."""
    return tuple(t[name].clone() for name in SINKS)
