"""Packed twins of transformers' cache layers: dynamic, sliding, static and static-sliding.

Each has the length and mask semantics of the layer it replaces; they differ in their stores and in how they
count tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from rotatekv_fx.cache.codec import Codec, Parts
from rotatekv_fx.cache.layers import LayerSpec, PackedLayer, Store
from rotatekv_fx.cache.stores import GrowingStore, RingStore
from rotatekv_fx.errors import StateError


class PackedDynamicLayer(PackedLayer, DynamicLayer):
    """Grows with every token."""

    def __init__(self, replaced: DynamicLayer, spec: LayerSpec, owner: PackedLayer | None):
        DynamicLayer.__init__(self)
        self._set_up(spec, owner)
        self.length = 0

    def _store(self, codecs: tuple[Codec, ...], tokens: int | None) -> Store:
        return GrowingStore(codecs, tokens)

    def _capacity(self) -> int | None:
        return None

    def _start(self) -> int:
        return self.length

    def _length_on_host(self) -> int:
        return self.length

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        count = key.shape[2]
        if self.history.parts:
            self.history.reserve(count + self._ahead())
        else:
            self.history.start_with((key, value), max(0, count - self.window + self._ahead()))

    def _advance(self, count: int) -> None:
        self.length += count

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens; a positive number is the length to keep (transformers
        5.17).
        """
        self.prompt_open = False
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.length - tokens_to_remove)
        remove = min(remove, self.length)
        if not remove:
            return
        self._prepare_crop()
        history, recent, *positions = self._own_stores()
        self.length -= remove
        # tokens that come back into the window are read exactly as far as the ring still has them
        coded = min(self.length, max(self.length - self.window, self.exact_from))
        self.exact_from = min(self.exact_from, self.length)
        history.drop_last(max(0, history.end - coded))
        recent.counted(self.length)
        for store in positions:
            store.drop_last(remove)
        if self.sinks is not None:
            self.sinks.drop_from(self.length)

    def _prepare_crop(self) -> None:
        """Raise where tokens that a crop would bring back are gone."""

    def reset(self) -> None:
        """Forget all tokens."""
        self._set_up(self.spec, None if self.owner is self else self.owner)
        self.length, self.is_initialized = 0, False


class PackedSlidingLayer(PackedDynamicLayer, DynamicSlidingWindowLayer):
    """Keeps the last sliding_window tokens: in rings, which `decode` can read, until tokens are to be removed
    or the past is recorded.
    """

    def __init__(self, replaced: DynamicSlidingWindowLayer, spec: LayerSpec, owner: PackedLayer | None):
        DynamicSlidingWindowLayer.__init__(self, replaced.sliding_window)
        self.record_past = getattr(replaced, "record_past", False)
        self.rings = not self.record_past
        self._set_up(spec, owner)
        self.length = 0

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        PackedLayer.lazy_initialization(self, key, value)
        self._limit()

    def decodes(self, query: Tensor, mask: Tensor | None) -> bool:
        """As others, while there are rings: codes that move in their buffers have no fixed slots."""
        return self.rings and super().decodes(query, mask)

    def _store(self, codecs: tuple[Codec, ...], tokens: int | None) -> Store:
        assert tokens is not None
        if self.rings:
            return RingStore(codecs, tokens, wraps=True, fixed=False, grows=True)
        return GrowingStore(codecs, tokens)

    def _ahead(self) -> int:
        return super()._ahead() if self.rings else 0

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        self.history.reserve(self.length + key.shape[2] - self.window + self._ahead())

    def _capacity(self) -> int:
        return self.sliding_window

    def _advance(self, count: int) -> None:
        self.length += count
        self.cumulative_length = self.length

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next crop."""
        self.record_past = True
        self._unroll()
        if self.is_initialized:
            self._limit()

    def _unroll(self) -> None:
        """Stores that can grow and shrink, in place of rings."""
        if self.rings and self.is_initialized:
            self.history = self.history.unrolled(self.sliding_window - self.window)
            if self.positions is not None:
                self.positions.settle()
                self.positions.store = self.positions.store.unrolled(self.sliding_window)
        self.rings = False

    def _limit(self) -> None:
        """While the past is recorded, no store forgets; otherwise together they hold the sliding window."""
        if self.rings:
            return
        limit = None if self.record_past else self.sliding_window
        self.history.limit = None if limit is None else limit - self.window
        if self.positions is not None:
            self.positions.store.limit = limit

    def _begin_positions(self, positions: Parts, start: Tensor | int) -> None:
        super()._begin_positions(positions, start)
        self._limit()

    def _prepare_crop(self) -> None:
        if self.length >= self.sliding_window and not self.record_past:
            raise StateError(
                f"a sliding layer of {self.sliding_window} tokens is full and cannot be cropped; call "
                "cache.activate_past_recording() before the tokens are added."
            )
        self._unroll()

    def crop(self, tokens_to_remove: int) -> None:
        """As a dynamic layer; then forget what lies outside the sliding window."""
        super().crop(tokens_to_remove)
        self.cumulative_length = self.length
        if self.is_initialized and not self.rings:
            held = self.length - self.history.first
            self.history.drop_first(min(len(self.history), held - self.sliding_window))
            if self.positions is not None:
                self.positions.settle()
                self.positions.store.drop_first(len(self.positions.store) - self.sliding_window)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length, self.rings = 0, not self.record_past


class PackedStaticLayer(PackedLayer, StaticLayer):
    """Fixed buffers, written in place."""

    def __init__(self, replaced: StaticLayer, spec: LayerSpec, owner: PackedLayer | None):
        StaticLayer.__init__(self, replaced.max_cache_len)
        self._set_up(spec, owner)

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        PackedLayer.lazy_initialization(self, key, value)
        # a copy of the host's zero would wait for the device
        self.cumulative_length = torch.zeros_like(self.cumulative_length, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def _store(self, codecs: tuple[Codec, ...], tokens: int | None) -> Store:
        assert tokens is not None
        return RingStore(codecs, tokens, wraps=self.is_sliding, fixed=True)

    def _ring(self, codecs: tuple[Codec, ...], tokens: int) -> RingStore:
        return RingStore(codecs, tokens, wraps=True, fixed=True)

    def _capacity(self) -> int:
        return self.max_cache_len

    def _start(self) -> Tensor | int:
        return self.cumulative_length.clone()

    def _known_start(self) -> int | None:
        if not self.is_initialized:
            return 0
        # one synchronisation a layer and chunk after the first, outside of compiled code
        return None if torch.compiler.is_compiling() else int(self.cumulative_length)

    def _advance(self, count: int) -> None:
        self.cumulative_length.add_(count)

    def _check_fits(self, count: int) -> None:
        """Raise where `count` new tokens have no room.

        On a GPU only what needs no synchronisation is checked: a token too many fails when it is written.
        """
        held, length = 0, self.cumulative_length
        if self.is_initialized and length.device.type == "cpu" and not torch.compiler.is_compiling():
            held = int(length)
        if held + count > self.max_cache_len:
            raise StateError(
                f"{count} new tokens do not fit a static cache of {self.max_cache_len} that holds {held}; "
                "allocate a longer one (max_cache_len), or prefill a shorter prompt."
            )

    def _in_order(self) -> bool:
        return not self.spec.window  # the ring is as long as the sequence may become, and never wraps

    def _change_batch(self, batch: int, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized and batch != self.batch_size:
            raise StateError(
                f"a static cache of batch size {self.batch_size} cannot change to {batch}; allocate another."
            )
        super()._change_batch(batch, function)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens, as many as the slack at most: others are codes only.

        Raises:
            StateError: a window is kept, and more are to be removed.
        """
        if self.spec.window and -tokens_to_remove > max(self.spec.slack, 1):
            raise StateError(
                f"a static cache with a recent window cannot remove {-tokens_to_remove} tokens; keep more "
                f"exact tokens than slack={self.spec.slack}, or use a dynamic cache."
            )
        super().crop(tokens_to_remove)
        self.prompt_open = False
        if self.is_initialized:
            self.recent.counted(self.cumulative_length)
            self.history.counted(self.cumulative_length - self.window)

    def reset(self) -> None:
        """Forget all tokens, in place."""
        for store in self._own_stores():
            store.reset()
        self.cumulative_length.zero_()
        self.prompt_open = True
        if self.sinks is not None:
            self.sinks.reset()


class PackedStaticSlidingLayer(PackedStaticLayer, StaticSlidingWindowLayer):
    """Fixed buffers for the last sliding_window tokens."""

    def __init__(self, replaced: StaticSlidingWindowLayer, spec: LayerSpec, owner: PackedLayer | None):
        StaticSlidingWindowLayer.__init__(self, replaced.max_cache_len, replaced.max_cache_len)
        self._set_up(spec, owner)

    def _check_fits(self, count: int) -> None:
        """Any number fits: the oldest tokens leave."""

    def _advance(self, count: int) -> None:
        super()._advance(count)
        self.cumulative_length_int += count

    def _in_order(self) -> bool:
        return False

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
