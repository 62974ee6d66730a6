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
from rotatekv_fx.export.codes import levels, regroup
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


def made_names(spec: LayerSpec) -> list[str]:
    """Names of what `put_in` makes for the layer's state: new rows of the history, then the window."""
    return history(spec) + ([f"recent_{side}s" for side in SIDES] if spec.window else [])


def history(spec: LayerSpec) -> list[str]:
    """Names of all history tensors."""
    return [n for c, side in zip((spec.key, spec.value), SIDES, strict=True) for n in history_names(c, side)]


def ordered(spec: LayerSpec, new: State) -> tuple[Tensor, ...]:
    """The tensors of `made_names`."""
    return tuple(new[name] for name in made_names(spec))


def encode(codec: Codec, x: Tensor) -> tuple[Tensor, ...]:
    """[B, H, S, D] -> what is stored, as `Side.parts`."""
    q = codec.quantizer
    return (x,) if q is None else quantizer.quantize(regroup(x, q.group), q.bits, q.group, q.clip, q.scheme)


def decode(codec: Codec, parts: tuple[Tensor, ...]) -> Tensor:
    """What is stored -> values by group, [B, Ng, N, group]; or by head, where it is exact."""
    if codec.quantizer is None:
        return parts[0]
    codes, scale, offset = parts
    values = levels(codes, codec.quantizer.bits, codec.quantizer.group)
    step, start = scale.float()[..., None], offset.float()[..., None]
    return step * (values - start) if codec.quantizer.scheme == "zero_point" else start + step * values


def base_of(codec: Codec, parts: tuple[Tensor, ...]) -> Tensor:
    """Value of code 0 in each group, fp32 [B, Ng, N]."""
    scale, offset = parts[1].float(), parts[2].float()
    return -scale * offset if codec.quantizer.scheme == "zero_point" else offset


def side_of(tensors: State, side: str) -> tuple[Tensor, ...]:
    """The parts of "key" or "value" among `tensors`."""
    return tuple(tensors[f"{side}_{part}"] for part in PARTS if f"{side}_{part}" in tensors)


def put_in(spec: LayerSpec, t: State) -> tuple[State, State]:
    """Put new tokens in.

    Args:
        t: the layer's state before the step, with the sinks after it; key and value [B, Hkv, S, D]; leaving
            and staying, as in `Step`; matrix, and new_features [B, 1, L, F] (of the tokens that become codes)
            with spread, where keys are rotated and have a mean.

    Returns:
        What the step makes: the tensors of `made_names`; and what queries read: the parts of keys and values
        as `behind` has them, with exact_keys and exact_values [B, Hkv, X, D].
    """
    new, exact = into_window(spec, t)
    leaving = [t[side] for side in SIDES]
    if spec.window:
        leaving = [x.index_select(2, t["leaving"]).to(t["key"].dtype) for x in exact]
    joined = behind(spec, t, coded_rows(spec, t, *leaving))
    return new | joined[0], joined[1] | exact_columns(spec, t, exact)


def into_window(spec: LayerSpec, t: State) -> tuple[State, list[Tensor]]:
    """The window after the step, and exact keys and values before it with the new ones (none without it)."""
    new, joined = {}, []
    for side in SIDES if spec.window else ():
        # as in packed layers: codes must not depend on when a token is quantized
        joined.append(torch.cat([t[f"recent_{side}s"], as_exact(t[side], spec.exact_dtype)], 2))
        new[f"recent_{side}s"] = joined[-1].index_select(2, t["staying"])
    return new, joined


def exact_columns(spec: LayerSpec, t: State, tokens: list[Tensor]) -> State:
    """Sinks, and then these exact keys and values, if there are any."""
    made = {}
    for i, side in enumerate(SIDES):
        stores = ([t[f"sink_{side}s"]] if spec.sinks else []) + tokens[i : i + 1]
        joined = torch.cat(stores, 2) if len(stores) > 1 else stores[0] if stores else t[side][:, :, :0]
        made[f"exact_{side}s"] = joined.to(t[side].dtype)
    return made


def behind(spec: LayerSpec, t: State, rows: list[Tensor]) -> tuple[State, State]:
    """New rows of the history, and the history with them: codes [B, Ng, bytes, C], scale and offset
    [B, Ng, C]; or, exact, [B, H, C, D].
    """
    names, joined = history(spec), []
    for name, row in zip(names, rows, strict=True):
        place = 3 if name.endswith("codes") else 2
        joined.append(torch.cat([t[name], row]).movedim(0, place).contiguous())
    kept = [row.contiguous() for row in rows]
    return tuple(dict(zip(names, tensors, strict=True)) for tensors in (kept, joined))


def coded_rows(spec: LayerSpec, t: State, key: Tensor, value: Tensor) -> list[Tensor]:
    """Tokens [B, Hkv, L, D] as new rows of the history."""
    if "spread" in t:
        key = key - t["new_features"] @ t["spread"]
    if "matrix" in t:
        key = regroup(key, t["matrix"].shape[-1]) @ t["matrix"]
    return _rows(spec, key, value)


def left(spec: LayerSpec, t: State) -> tuple[Tensor, ...]:
    """New rows of the histories of several layers, as if their heads were those of one, where only tokens of
    the window leave it.

    Args:
        t: recent_keys and recent_values of each layer; else as in `coded_rows`.
    """
    leaving = []
    for side in SIDES:
        stores = [x for name, x in t.items() if name.startswith(f"recent_{side}s")]
        leaving.append(torch.cat(stores, 1).index_select(2, t["leaving"]).float())
    return tuple(row.contiguous() for row in coded_rows(spec, t, *leaving))


def none_left(spec: LayerSpec, t: State) -> tuple[Tensor, ...]:
    """No rows, in the form of `left`."""
    rows = []
    for side, codec in zip(SIDES, (spec.key, spec.value), strict=True):
        stores = [x for name, x in t.items() if name.startswith(f"recent_{side}s")]
        q, channels = codec.quantizer, sum(x.shape[1] * x.shape[3] for x in stores)
        sizes = (0, 1, channels // q.group)
        offset = torch.int16 if q.scheme == "zero_point" else torch.float16
        rows.append(torch.zeros(*sizes, quantizer.packed_bytes(q.group, q.bits), dtype=torch.uint8))
        rows += [torch.zeros(sizes, dtype=dtype) for dtype in (torch.float16, offset)]
    return tuple(rows)


def _rows(spec: LayerSpec, key: Tensor, value: Tensor) -> list[Tensor]:
    """New rows of the history of keys, then of values, tokens first; made together where they are stored
    alike, which halves the nodes.
    """
    if spec.key.quantizer is None or spec.key.quantizer != spec.value.quantizer:
        parts = [*encode(spec.key, key), *encode(spec.value, value)]
        return [part.movedim(2, 0) for part in parts]
    group = spec.key.quantizer.group
    pair = [regroup(x, group) for x in (key, value)]
    sizes = [x.shape[1] for x in pair]
    both = [part.movedim(2, 0).split(sizes, 2) for part in encode(spec.key, torch.cat(pair, 1))]
    return [part[i] for i in range(2) for part in both]


def seen_columns(spec: LayerSpec, t: State) -> Tensor:
    """Which columns each query sees: bool [B, 1, S, C + X], of codes, sinks and exact tokens.

    Args:
        t: visible [B or 1, 1, S, T]; seen_codes [.., S, C] and seen_exact [.., S, R + S], which of those a
            query sees in its window or outside; queries [S], numbers of the new tokens; first [1], number of
            the first coded column's; sink_tokens, after the step.
    """
    seen = [t["seen_codes"]]
    if spec.sinks:
        tokens = t["sink_tokens"].long()
        seen[0] = columns.without_sinks(seen[0], tokens, t["first"])
        seen.append(columns.sinks(t["visible"], tokens, t["queries"], spec.window))
    if spec.window:
        seen.append(t["seen_exact"])
    return torch.cat([s.expand(t["key"].shape[0], -1, -1, -1) for s in seen], -1)


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
