"""Packed twins of transformers' cache layers: dynamic, sliding, static and static-sliding.

A layer holds tensors whose batch axis is 0 and whose token axis is 2 (see `codec`): those of the keys, of the values,
and, where it is the first layer to receive them, of the positions that several layers share. Each keeps the length
and mask semantics of the layer it replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from rotatekv_fx.cache.codec import Codec, Parts
from rotatekv_fx.cache.sinks import SinkStore
from rotatekv_fx.errors import StateError


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer stores: codecs of keys and values, sinks and the dtype of exact tokens."""

    key: Codec
    value: Codec
    sinks: int
    exact_dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class _Window:
    """The tokens that an update lets the attention see.

    Attributes:
        parts: stored tensors on the token axis that the mask was made for.
        first: number of the token in column 0.
        fresh: columns of the new tokens, int64 [S].
        start: number of the first new token.
    """

    parts: Parts
    first: Tensor | int
    fresh: Tensor
    start: Tensor | int


class PackedLayer:
    """What the four kinds share. `_append` and `_keep` differ."""

    spec: LayerSpec
    owner: PackedLayer  # holds the positions that this layer shares; itself for the first
    is_initialized: bool

    def _set_up(self, spec: LayerSpec, owner: PackedLayer | None) -> None:
        self.spec, self.owner = spec, owner or self
        self.tokens: Parts = ()
        self.positions: Parts = ()  # of the last update's columns, where this layer owns them
        self.sinks: SinkStore | None = None
        self.residual: Tensor | None = None  # the block's input, between its pre-forward hook and the attention
        self.prompt_open = True  # until the first one-token step or crop, new tokens may become sinks

    # -- the step ---------------------------------------------------------------------------------------------------
    def step(
        self, key: Tensor, value: Tensor, positions: Parts, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Parts]:
        """Store new tokens and read back every token that the attention sees.

        Args:
            key, value: [B, Hkv, S, D] in the form that the recipe stores.
            positions: stored positions [B or 1, 1, S, ...] of the new tokens.
            residual: the block's input [B, S, C] while sinks are chosen, else None.
            mask: attention mask [B or 1, 1, S, N], bool or additive, or None.

        Returns:
            Keys and values [B, Hkv, N, D], positions [B or 1, 1, N, ...].
        """
        owns = self.owner is self
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        seen = self._append(key, value, positions if owns else ())
        split = self.spec.key.parts, self.spec.key.parts + self.spec.value.parts
        if owns:
            self.positions = seen.parts[split[1] :]
        keys = self.spec.key.decode(seen.parts[: split[0]])
        values = self.spec.value.decode(seen.parts[split[0] : split[1]])
        if self.spec.sinks:
            if key.shape[2] > 1 and self.prompt_open and residual is not None:
                if self.sinks is None:
                    self.sinks = SinkStore(self.spec.sinks, key, value, self.spec.exact_dtype)
                self.sinks.choose(residual, visible_to_itself(mask, seen.fresh), key, value, seen.start)
            elif key.shape[2] == 1:
                self.prompt_open = False
            if self.sinks is not None:
                keys, values = self.sinks.restore(keys, values, seen.first)
        return keys, values, self.owner.positions

    def _append(self, key: Tensor, value: Tensor, positions: Parts) -> _Window:
        raise NotImplementedError

    def _encode(self, key: Tensor, value: Tensor, positions: Parts) -> Parts:
        return (*self.spec.key.encode(key), *self.spec.value.encode(value), *positions)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise: only rewritten attention modules may write to a packed layer.

        Raises:
            StateError: always.
        """
        raise StateError(
            "an attention module that was not transformed wrote to a packed cache layer; use the cache with the "
            "model that filled it, or a new cache."
        )

    # -- whole-cache operations -------------------------------------------------------------------------------------
    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation once to each tensor; rows shared by the whole batch (batch 1) stay."""
        batch = self.tokens[0].shape[0] if self.tokens else 0
        self.tokens = tuple(t if t.shape[0] != batch else function(t) for t in self.tokens)
        if self.sinks is not None:
            self.sinks.map_batch(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._map_batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices`."""
        self._map_batch(lambda t: t[indices])

    def offload(self) -> None:
        """Raise: packed layers stay on their device.

        Raises:
            StateError: always.
        """
        raise StateError("a packed cache cannot be offloaded; use cache_implementation='dynamic' or 'static'.")

    def prefetch(self) -> None:
        """Nothing to do: packed layers stay on their device."""

    def stored_tensors(self) -> list[Tensor]:
        """Every tensor the layer holds."""
        return [*self.tokens, *self.positions, *(self.sinks.tensors() if self.sinks is not None else ())]


class PackedDynamicLayer(PackedLayer, DynamicLayer):
    """Grows with every token."""

    def __init__(self, replaced: DynamicLayer, spec: LayerSpec, owner: PackedLayer | None):
        super().__init__()
        self._set_up(spec, owner)

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        self.dtype, self.device = key.dtype, key.device
        self.is_initialized = True

    def _append(self, key: Tensor, value: Tensor, positions: Parts) -> _Window:
        start, length = self.get_seq_length(), key.shape[2]
        everything = append_tokens(self.tokens, self._encode(key, value, positions))
        self.tokens = self._keep(everything, length)
        columns = everything[0].shape[2]
        fresh = torch.arange(columns - length, columns, device=key.device)
        return _Window(everything, start + length - columns, fresh, start)

    def _keep(self, parts: Parts, length: int) -> Parts:
        return parts

    def get_seq_length(self) -> int:
        return self.tokens[0].shape[2] if self.tokens else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens; a positive number is the length to keep, as in transformers 5.17."""
        length = self.get_seq_length()
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        self.prompt_open = False
        if not remove or not self.tokens:
            return
        self._remove(min(remove, length))
        if self.sinks is not None:
            self.sinks.drop_from(length - remove)

    def _remove(self, count: int) -> None:
        self.tokens = tuple(t[:, :, : t.shape[2] - count].clone() for t in self.tokens)

    def reset(self) -> None:
        """Forget all tokens."""
        self._set_up(self.spec, self.owner)
        self.is_initialized = False


class PackedSlidingLayer(PackedDynamicLayer, DynamicSlidingWindowLayer):
    """Keeps the last sliding_window - 1 tokens."""

    def __init__(self, replaced: DynamicSlidingWindowLayer, spec: LayerSpec, owner: PackedLayer | None):
        DynamicSlidingWindowLayer.__init__(self, replaced.sliding_window)
        self.record_past = getattr(replaced, "record_past", False)
        self._set_up(spec, owner)

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        self.dtype, self.device = key.dtype, key.device
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)
        self.is_initialized = True

    def _append(self, key: Tensor, value: Tensor, positions: Parts) -> _Window:
        seen = super()._append(key, value, positions)
        if not self.record_past:
            return seen
        visible = self.sliding_window - 1 + key.shape[2]
        hidden = max(seen.parts[0].shape[2] - visible, 0)
        parts = tuple(t[:, :, hidden:] for t in seen.parts)
        return _Window(parts, seen.first + hidden, seen.fresh - hidden, seen.start)

    def _keep(self, parts: Parts, length: int) -> Parts:
        self.cumulative_length += length
        return parts if self.record_past else last_tokens(parts, self.sliding_window - 1)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def _remove(self, count: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise StateError(
                f"a sliding layer of {self.sliding_window} tokens is full and cannot be cropped; call "
                "cache.activate_past_recording() before the tokens are added."
            )
        super()._remove(count)
        self.cumulative_length -= count

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.tokens = last_tokens(self.tokens, self.sliding_window - 1)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0


class PackedStaticLayer(PackedLayer, StaticLayer):
    """Fixed buffers, written in place."""

    def __init__(self, replaced: StaticLayer, spec: LayerSpec, owner: PackedLayer | None):
        StaticLayer.__init__(self, replaced.max_cache_len)
        self._set_up(spec, owner)

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        self.dtype, self.device, self.batch_size = key.dtype, key.device, key.shape[0]
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def _allocate(self, parts: Parts) -> None:
        """Buffers for `max_cache_len` tokens, shaped like `parts`."""
        self.tokens = tuple(t.new_zeros((*t.shape[:2], self.max_cache_len, *t.shape[3:])) for t in parts)
        if not torch.compiler.is_compiling():
            for tensor in (*self.tokens, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def _append(self, key: Tensor, value: Tensor, positions: Parts) -> _Window:
        length = key.shape[2]
        self._check_length(length)
        if not self.tokens:
            self._allocate(self._encode(key[:, :, :1], value[:, :, :1], _batched(positions, key, slice(0, 1))))
        start = self.cumulative_length.clone()
        slots = torch.arange(length, device=key.device) + start
        self._write(key, value, positions, slots)
        self.cumulative_length.add_(length)
        return _Window(self.tokens, 0, slots, start)

    def _check_length(self, length: int) -> None:
        if length > self.max_cache_len:
            raise StateError(
                f"{length} new tokens do not fit a static cache of {self.max_cache_len}; allocate a longer one "
                "(max_cache_len), or prefill a shorter prompt."
            )

    def _write(self, key: Tensor, value: Tensor, positions: Parts, slots: Tensor) -> None:
        keys, values = self.spec.key.parts, self.spec.key.parts + self.spec.value.parts
        self.spec.key.write(self.tokens[:keys], key, slots)
        self.spec.value.write(self.tokens[keys:values], value, slots)
        for buffer, new in zip(self.tokens[values:], _batched(positions, key), strict=True):
            buffer.index_copy_(2, slots, new)

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.tokens:
            return
        for tensor in (*self.tokens, *(self.sinks.tensors() if self.sinks is not None else ())):
            changed = function(tensor)
            if changed.shape != tensor.shape:
                raise StateError("a static cache cannot change its batch size; allocate a new cache.")
            tensor.copy_(changed)

    def reset(self) -> None:
        """Forget all tokens, in place."""
        for tensor in self.tokens:
            tensor.zero_()
        self.cumulative_length.zero_()
        self.prompt_open = True
        if self.sinks is not None:
            self.sinks.reset()


class PackedStaticSlidingLayer(PackedStaticLayer, StaticSlidingWindowLayer):
    """Fixed buffers for the last sliding_window tokens."""

    def __init__(self, replaced: StaticSlidingWindowLayer, spec: LayerSpec, owner: PackedLayer | None):
        StaticSlidingWindowLayer.__init__(self, replaced.max_cache_len, replaced.max_cache_len)
        self._set_up(spec, owner)

    def _check_length(self, length: int) -> None:
        """Any length fits: the oldest tokens leave."""

    def _append(self, key: Tensor, value: Tensor, positions: Parts) -> _Window:
        length, held, size = key.shape[2], self.cumulative_length_int, self.max_cache_len
        self.cumulative_length_int += length
        if held + length <= size:
            return super()._append(key, value, positions)
        new = self._encode(key, value, _batched(positions, key))
        if not self.tokens:
            self._allocate(tuple(t[:, :, :1] for t in new))
        if held >= size and length == 1:
            everything = tuple(torch.cat([old[:, :, 1:], t], 2) for old, t in zip(self.tokens, new, strict=True))
        elif held == 0:
            everything = new
        else:
            kept = slice(1, None) if held >= size else slice(0, held)
            everything = tuple(torch.cat([old[:, :, kept], t], 2) for old, t in zip(self.tokens, new, strict=True))
        for buffer, tokens in zip(self.tokens, everything, strict=True):
            buffer.copy_(tokens[:, :, -size:])
        columns = everything[0].shape[2]
        fresh = torch.arange(columns - length, columns, device=key.device)
        return _Window(everything, held + length - columns, fresh, held)

    def get_seq_length(self) -> int:
        return self.cumulative_length_int

    def reset(self) -> None:
        super().reset()
        self.cumulative_length_int = 0


TWINS: dict[type, type[PackedLayer]] = {
    DynamicLayer: PackedDynamicLayer,
    DynamicSlidingWindowLayer: PackedSlidingLayer,
    StaticLayer: PackedStaticLayer,
    StaticSlidingWindowLayer: PackedStaticSlidingLayer,
}


def append_tokens(old: Parts, new: Parts) -> Parts:
    """Concatenate along tokens; a tensor that came once for the whole batch is repeated when another is not."""
    if not old:
        return new
    pairs = []
    for a, b in zip(old, new, strict=True):
        batch = max(a.shape[0], b.shape[0])
        pairs.append(torch.cat([a.expand(batch, *a.shape[1:]), b.expand(batch, *b.shape[1:])], 2))
    return tuple(pairs)


def last_tokens(parts: Parts, count: int) -> Parts:
    """The last `count` tokens, in memory of their own."""
    return tuple(t if t.shape[2] <= count else t[:, :, t.shape[2] - count :].clone() for t in parts)


def _batched(positions: Parts, key: Tensor, tokens: slice = slice(None)) -> Parts:
    """Positions with the keys' batch, so that a static buffer can take any later step's."""
    return tuple(p[:, :, tokens].expand(key.shape[0], *p[:, :, tokens].shape[1:]) for p in positions)


def visible_to_itself(mask: Tensor | None, columns: Tensor) -> Tensor | None:
    """[B or 1, S] of whether each new token sees its own column: False marks padding."""
    if mask is None:
        return None
    itself = mask[:, 0].gather(-1, columns.view(1, -1, 1).expand(mask.shape[0], -1, 1)).squeeze(-1)
    return itself if mask.dtype is torch.bool else itself > torch.finfo(mask.dtype).min / 2
