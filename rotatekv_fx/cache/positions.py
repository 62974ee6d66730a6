"""Positions of cached tokens: what must be stored so that RoPE can be applied to a key when it is read.

Where the rows (cos and sin, say) are a function of a position id, the int32 id is stored and the model's own
rotary embedding is asked again. Otherwise (dynamic scaling) the rows themselves are, at half width where both
halves are equal. One store serves all layers that received the same tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from rotatekv_fx.capture import CapturedInput, Producer
from rotatekv_fx.errors import MatchError
from rotatekv_fx.sites import AttentionSite

_FAR = 1 << 20  # a position far past any context, to see whether rows depend on other positions


@dataclasses.dataclass
class _Rotary:
    """The model's rotary embedding as a function of ids; `leaves` has `ids_at` replaced when it is called."""

    producer: Producer
    leaves: list[Any]
    spec: pytree.TreeSpec
    ids_at: int

    def rows(self, ids: Tensor) -> Tensor:
        return self.rows_of(self.producer.module, ids)

    def rows_of(self, module: torch.nn.Module, ids: Tensor) -> Tensor:
        leaves = [_like(leaf, ids) if isinstance(leaf, torch.dtype) else leaf for leaf in self.leaves]
        leaves[self.ids_at] = ids
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = module(*args, **kwargs)
        return output if self.producer.index is None else output[self.producer.index]


def _like(dtype: torch.dtype, ids: Tensor) -> Tensor:
    return torch.zeros(1, 1, 1, dtype=dtype, device=ids.device)


@dataclasses.dataclass
class _Stored:
    """One positional input: made of ids by `rotary`, ids themselves (`rotary` None, integer), or rows."""

    rotary: _Rotary | None
    source: int  # which of PositionPlan.inputs
    repeat: str  # how a stored row becomes a full one: "full", "halves", "pairs"
    dtype: torch.dtype


@dataclasses.dataclass
class PositionPlan:
    """What of the attention module's inputs is stored with the keys, and how it is read back.

    Attributes:
        inputs: names of the inputs to store.
        key: equal for layers whose inputs were the same tensors.
    """

    inputs: tuple[str, ...]
    key: tuple[int, ...]
    stored: list[_Stored]

    @property
    def description(self) -> str:
        """What is stored, for the report."""
        if not self.stored:
            return "none"
        return (
            "ids"
            if all(s.rotary is not None or not s.dtype.is_floating_point for s in self.stored)
            else "rows"
        )

    def encode(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs [B or 1, S, ...] -> stored [B or 1, 1, S, width]."""
        repeats = {s.source: s.repeat for s in self.stored}
        return tuple(
            _shorten(t, repeats[i]).flatten(2).unsqueeze(1)
            if t.dim() > 2
            else _shorten(t, "full")[:, None, :, None]
            for i, t in enumerate(tensors)
        )

    def decode(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stored [B or 1, 1, N, width] -> the positional inputs of all N tokens."""
        result = []
        for one in self.stored:
            part = parts[one.source].squeeze(1)
            part = part.squeeze(-1) if part.dtype is torch.int32 else part
            if one.rotary is not None:
                result.append(one.rotary.rows(part.long()).to(part.device, one.dtype))
            elif one.repeat == "full":
                result.append(part.to(one.dtype))
            else:
                result.append(
                    part.repeat_interleave(2, -1) if one.repeat == "pairs" else torch.cat([part, part], -1)
                )
        return tuple(result)


def _shorten(tensor: Tensor, repeat: str) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.to(torch.int32)
    if repeat == "halves":
        return tensor[..., : tensor.shape[-1] // 2]
    return tensor[..., ::2] if repeat == "pairs" else tensor


def plan_positions(site: AttentionSite, shared: dict[tuple[int, torch.device], int]) -> PositionPlan:
    """Decide what to store for a site's positional inputs.

    Args:
        site: the attention site.
        shared: numbers tensors that layers have in common; extended in place.

    Raises:
        MatchError: a positional input has no token axis after the batch axis.
    """
    inputs: dict[str, CapturedInput] = {}
    stored = []
    for positional in site.positional:
        rotary, source = _function_of_ids(site, positional), positional
        if rotary is not None:
            source = _input_of(site, rotary.leaves[rotary.ids_at])
            rotary.leaves[rotary.ids_at] = None
        example = source.example
        if example.dim() < 2 or example.shape[1] != site.hidden_example.shape[1]:
            raise MatchError(
                f"positional input {source.name} has shape {list(example.shape)}; expected [B, S, ...]"
            )
        inputs.setdefault(source.name, source)
        index = list(inputs).index(source.name)
        repeat = "full" if rotary is not None else _repetition(positional.example)
        stored.append(_Stored(rotary, index, repeat, positional.example.dtype))
    # a store is read on its layers' device
    key = tuple(shared.setdefault((id(i.origin), i.example.device), len(shared)) for i in inputs.values())
    return PositionPlan(tuple(inputs), key, stored)


def _repetition(rows: Tensor) -> str:
    if rows.dim() < 3 or rows.shape[-1] % 2 or not rows.is_floating_point():
        return "full"
    if torch.equal(*rows.chunk(2, -1)):
        return "halves"
    return "pairs" if torch.equal(rows[..., ::2], rows[..., 1::2]) else "full"


def _input_of(site: AttentionSite, tensor: Tensor) -> CapturedInput:
    return next(i for i in site.capture.inputs if i.origin is tensor)


def _function_of_ids(site: AttentionSite, positional: CapturedInput) -> _Rotary | None:
    """The rotary embedding that made a positional input, if its rows depend on nothing but their own id."""
    if positional.producer is None:
        return None
    leaves, spec = pytree.tree_flatten((positional.producer.args, positional.producer.kwargs))
    received = {id(i.origin) for i in site.capture.inputs}
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and id(leaf) in received]
    places = [n for n in places if not leaves[n].is_floating_point()]
    if len(places) != 1:
        return None
    ids = leaves[places[0]]
    floats = [
        leaf.dtype if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves
    ]
    rotary = _Rotary(positional.producer, floats, spec, places[0])
    try:
        with torch.no_grad():
            probe = copy.deepcopy(positional.producer.module)
            alone = rotary.rows_of(probe, ids)
            far = torch.cat([ids, torch.full_like(ids[:, :1], _FAR)], 1)
            beside = rotary.rows_of(probe, far)[:, : ids.shape[1]]
            after = rotary.rows_of(probe, ids)
    except Exception:  # a module that cannot be asked again is simply not a function of ids
        return None
    same = all(
        torch.equal(positional.origin, rows.to(positional.origin.dtype)) for rows in (alone, beside, after)
    )
    return rotary if same else None
