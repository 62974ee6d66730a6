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
from rotatekv_fx.cache.layers import LayerSpec
from rotatekv_fx.export import columns
from rotatekv_fx.kernels.attention import reference as attention
from rotatekv_fx.kernels.hadamard import reference as hadamard
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
        queries: int64 [S], their numbers.
        position_ids: [B, T].
        prompt: bool [], whether new tokens may become sinks.
        several: bool [], whether there is more than one.
        leaving, staying: int64, places among recent and new tokens of those that are quantized, and of those
            that stay exact; None without a window.
        memo: what layers have in common, those with a sliding window and those without.
    """

    tokens: int
    new: int
    queries: Tensor
    position_ids: Tensor
    prompt: Tensor
    several: Tensor
    leaving: Tensor | None
    staying: Tensor | None
    memo: dict[bool, State]


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


def stored(spec: LayerSpec, t: State) -> tuple[Tensor, ...]:
    """Put new tokens in: a layer's state after the step, and what its attention reads.

    Args:
        t: the layer's state before the step, with the sinks after it; key and value [B, Hkv, S, D];
            visible [B or 1, 1, S, T]; seen_codes [.., S, C] and seen_exact [.., S, R + S], which of those a
            query sees in its window or outside; queries [S], numbers of the new tokens; first [1], number of
            the first coded column's; leaving and staying, as in `Step`; matrix, and features with spread,
            where keys are rotated and have a mean.

    Returns:
        New rows of the history, the recent tokens after the step; then the tensors named in READ (the parts
        of keys and values as the codecs have them).
    """
    pair = [t["key"], t["value"]]
    exact, leaving, window = [x[:, :, :0] for x in pair], pair, spec.window
    if window:  # as in packed layers: codes must not depend on when a token is quantized
        pair = [as_exact(x, spec.exact_dtype).to(x.dtype) for x in pair]
        exact = [torch.cat([t[f"recent_{n}s"].to(x.dtype), x], 2) for n, x in zip(SIDES, pair, strict=True)]
        leaving = [x.index_select(2, t["leaving"]) for x in exact]
    recent = [as_exact(x.index_select(2, t["staying"]), spec.exact_dtype) for x in exact] if window else []
    coded, history = leaving[0], t[history_names(spec.key, "key")[0]].shape[0]
    if "spread" in t:
        columns_of_new = torch.arange(coded.shape[2], device=coded.device) + history
        coded = coded - mean_at(t["features"].index_select(2, columns_of_new), t["spread"])
    if "matrix" in t:
        coded = hadamard.rotate(coded, t["matrix"], None, False)
    rows = [part.movedim(2, 0).contiguous() for part in _encoded(spec, coded, leaving[1])]
    names = [n for c, side in zip((spec.key, spec.value), SIDES, strict=True) for n in history_names(c, side)]
    joined = [torch.cat([t[n], row]).movedim(0, 2).contiguous() for n, row in zip(names, rows, strict=True)]
    seen = [t["seen_codes"]]
    if spec.sinks:
        tokens = t["sink_tokens"].long()
        seen[0] = columns.without_sinks(seen[0], tokens, t["first"])
        seen.append(columns.sinks(t["visible"], tokens, t["queries"], window))
        exact = [torch.cat([t[f"sink_{n}s"].to(x.dtype), x], 2) for n, x in zip(SIDES, exact, strict=True)]
    if window:
        seen.append(t["seen_exact"])
    batch = pair[0].shape[0]
    of_codes, *of_exact = (s.expand(batch, -1, -1, -1) for s in seen)
    of_exact = torch.cat(of_exact, -1) if of_exact else of_codes[..., :0]
    return *rows, *recent, *joined, of_codes, of_exact, *exact


def _encoded(spec: LayerSpec, key: Tensor, value: Tensor) -> list[Tensor]:
    """Parts of keys, then of values; made together where they are stored alike, which halves the nodes."""
    if spec.key != spec.value or spec.key.quantizer is None or key.shape[3] != value.shape[3]:
        return [*encode(spec.key, key), *encode(spec.value, value)]
    both = [part.chunk(2, 1) for part in encode(spec.key, torch.cat([key, value], 1))]
    return [part[i] for i in range(2) for part in both]


def mean_at(features: Tensor, spread: Tensor) -> Tensor:
    """Features [B, F, N] of positions and [Hkv, F, D] -> the mean there, [B, Hkv, N, D]."""
    return features.transpose(1, 2)[:, None] @ spread


def chosen_sinks(count: int, t: State) -> tuple[Tensor, ...]:
    """The sinks after a step: owners of the largest |values| of the block's input over the prompt.

    Args:
        t: sink_scores [B, count], sink_tokens int32 [B, count] (-1 for an unused slot, or one whose token has
            another), sink_keys and sink_values [B, Hkv, count, D]; residual [B, S, C]; visible [B or 1, 1, S,
            T]; queries [S], numbers of the new tokens; key and value [B, Hkv, S, D].
    """
    scores, tokens, *stores = (t[name] for name in SINKS)
    own = columns.see_themselves(t["visible"], t["queries"]).expand(scores.shape[0], -1)
    found, local = attention.select_sinks(t["residual"], own, count)
    best = torch.cat([scores, found], 1).topk(count, 1)
    numbers = torch.cat([tokens, torch.where(found < 0, -1, local + t["queries"][0]).int()], 1)
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
