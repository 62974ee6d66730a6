"""What packed cache layers share: their stores, and how new tokens are stored and attended to.

A layer keeps tokens outside the recent window as codes (its history), and the last `window + slack` tokens
exactly in a ring:

    new tokens -> recent (exact, a ring) -> history (codes) as they leave the window

and, if it is the first layer to receive them, the positions that several layers share. Tokens of the slack
are in both, so that a crop of up to as many restores the window, and so is the oldest token of the window,
whose codes the next step reads.

One new token is attended to on the packed tensors themselves, by the op `decode`, or `decode_before_rope`
where the recipe stores keys before RoPE; a prompt on a GPU by the op `prefill`, where it stores them after
RoPE. Otherwise the attention reads one token axis:

* one new token, or no window: history, then the window.
* several new tokens and a window: history and what leaves the window through the codes, then the window and
  the new tokens exact. The mask lets query i see the exact form of token j where j > i - window, and the
  other form elsewhere, so that results do not depend on how a prompt is cut into chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from rotatekv_fx import masks
from rotatekv_fx.cache.codec import Codec, Parts, as_exact, as_it_is
from rotatekv_fx.cache.sinks import SinkStore
from rotatekv_fx.cache.stores import GrowingStore, PositionStore, RingStore
from rotatekv_fx.errors import StateError

ops = torch.ops.rotatekv
_MOST_CHANNELS = 256  # of a head, in SDPA's kernels
Store = GrowingStore | RingStore


class KeyForm(Protocol):
    """How an exact key becomes what is quantized, and back, given its positions."""

    def to_codes(self, key: Tensor, positions: Parts) -> Tensor: ...

    def values_to_codes(self, value: Tensor) -> Tensor: ...

    def from_codes(self, key: Tensor, positions: Parts) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer stores.

    Attributes:
        key, value: codecs of old tokens.
        sinks: size of the sink store; 0 for none.
        window: recent tokens that a query reads exactly.
        slack: exact tokens kept beyond the window, so that a crop of up to as many restores it.
        exact_dtype: of sinks and recent tokens.
    """

    key: Codec
    value: Codec
    sinks: int
    window: int
    slack: int
    exact_dtype: torch.dtype

    @property
    def recent(self) -> int:
        """Slots of exact tokens: one more than the window at least, so that the token that leaves it is still
        there.
        """
        return self.window + max(self.slack, 1) if self.window else 0


@dataclasses.dataclass(frozen=True)
class Step:
    """What the attention reads after an update.

    Attributes:
        keys, values: [B, Hkv, N, D].
        positions: stored positions [B or 1, 1, N, ...] of the same columns.
        mask: for these columns, bool or additive, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Parts
    mask: Tensor | None


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A stretch of the token axis on its way to the attention.

    Attributes:
        keys, values: [B, Hkv, N, D].
        numbers: int64 [N], each column's token, negative where it is empty.
        form: "any", or which of two forms these are: "codes" or "exact".
    """

    keys: Tensor
    values: Tensor
    numbers: Tensor
    form: str = "any"


class PackedLayer:
    """What the four kinds share; they differ in their stores and in how they count tokens."""

    is_sliding: bool
    is_initialized: bool
    get_mask_sizes: Callable[[int], tuple[int, int]]
    history: Store
    recent: RingStore
    window: int  # of the spec, or what the layer holds at most
    exact_from: int  # in growing layers, the first token whose exact form is in `recent`
    positions: PositionStore | None  # held by the owner, where the recipe needs any

    def _set_up(self, spec: LayerSpec, owner: PackedLayer | None) -> None:
        self.spec, self.owner, self.positions = spec, owner or self, None
        self.sinks: SinkStore | None = None
        # the block's input, between its pre-forward hook and the attention
        self.residual: Tensor | None = None
        # until the first one-token step or crop, new tokens may become sinks
        self.prompt_open = True
        self.exact_from = 0

    def _store(self, codecs: tuple[Codec, ...], tokens: int | None) -> Store:
        """A store for at most that many tokens, or for any number."""
        raise NotImplementedError

    def _ring(self, codecs: tuple[Codec, ...], tokens: int) -> RingStore:
        """A store for the last tokens."""
        return RingStore(codecs, tokens, wraps=True, fixed=False)

    def _capacity(self) -> int | None:
        """Tokens the layer holds at most, or None."""
        raise NotImplementedError

    def _start(self) -> Tensor | int:
        """Number of the next token."""
        raise NotImplementedError

    def _advance(self, count: int) -> None:
        """Count new tokens."""
        raise NotImplementedError

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        """Make the stores, all but the positions'. `key` and `value` [B, Hkv, S, D] show heads, dtype and
        device.
        """
        self.dtype, self.device, self.batch_size = key.dtype, key.device, key.shape[0]
        self.keys = self.values = key.new_empty(0)  # models ask transformers' layers how much these hold
        spec = self.spec = dataclasses.replace(self.spec, key=self.spec.key.on(key.device))
        capacity = self._capacity()
        self.window = spec.window if capacity is None else min(spec.window, capacity)
        exact = tuple(as_exact(x, spec.exact_dtype) for x in (key, value))
        codes = None if capacity is None else capacity - self.window + self._ahead()
        self.history = self._store((spec.key, spec.value), codes)
        self.history.allocate((key, value))
        self.recent = self._ring(tuple(as_it_is(x) for x in exact), spec.recent)
        self.recent.allocate(exact)
        self.is_initialized = True

    def step(
        self,
        key: Tensor,
        value: Tensor,
        positions: Parts,
        residual: Tensor | None,
        mask: Tensor | None,
        form: KeyForm,
    ) -> Step:
        """Store new tokens and read back every token that the attention sees.

        Args:
            key, value: [B, Hkv, S, D] in the form that exact tokens are kept in.
            positions: stored positions [B or 1, 1, S, ...] of the new tokens.
            residual: the block's input [B, S, C] while sinks are chosen, else None.
            mask: attention mask [B or 1, 1, S, N], bool or additive, or None.
            form: turns exact keys into what is quantized, and back.
        """
        count = key.shape[2]
        self._check_fits(count)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        start, (columns, offset) = self._start(), self.get_mask_sizes(count)
        new = torch.arange(count, device=key.device) + start
        if self.spec.window:  # codes must not depend on when a token is quantized
            key, value = (as_exact(x, self.spec.exact_dtype).to(x.dtype) for x in (key, value))
        if self.owner is self:
            self._begin_positions(positions, start)
        if count > 1 and (self.is_sliding or self.spec.window):
            axes = self._read_before(key, value, new, form)
            self._write(key, value, new, form)
        else:
            self._write(key, value, new, form)
            axes = self._read_after(new, form)
        if self.spec.sinks:
            self._choose_sinks(key, value, residual, visible_to_itself(mask, new - offset), start)
        self._advance(count)
        self._hide_sinks()
        return self._joined(axes, mask, new, columns, offset)

    def decodes(self, query: Tensor, mask: Tensor | None) -> bool:
        """Whether `decode` can attend to this layer: one token, and a window whose tokens are all exact."""
        if query.shape[2] != 1 or not (mask is None or mask.shape[1] == 1):
            return False
        coded = self._coded() if self.is_initialized else None
        return coded is None or coded == max(0, self._length_on_host() - self.window)

    def decode(
        self,
        op: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Parts,
        mask: Tensor | None,
        key_map: list[Tensor],
        scale: float,
        softcap: float,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Store one new token and attend to the packed tensors as they are.

        Args:
            op: `decode` or `decode_before_rope`.
            query: [B, Hq, 1, D], after RoPE.
            key, value: [B, Hkv, 1, D] in the form that exact tokens are kept in.
            positions: stored positions [B or 1, 1, 1, 1] of the new token, or none.
            mask: bool or floating [B or 1, 1, 1, N], or None.
            key_map, scale, softcap, sink_logits: as the op takes them.

        Returns:
            [B, 1, Hq, Dv].
        """
        self._check_fits(1)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        start, (_, offset) = self._start(), self.get_mask_sizes(1)
        if self.owner is self:
            self._begin_positions(positions, start)
        self.prompt_open = False
        self._make_room(key, value)
        out = op(
            query, key, value, *self._held(key_map, positions, start),
            None if mask is None else mask[:, 0, 0], offset,
            self._capacity() if self.is_sliding else 0, scale, softcap, sink_logits,
        )  # fmt: skip
        self._stored(1)
        self._advance(1)
        return out

    def prefill_start(self, query: Tensor, value: Tensor, mask: Tensor | None) -> int | None:
        """Number of the first new token, where `prefill` can attend to this layer: several tokens, causal,
        and a window that is whole.
        """
        if query.shape[2] == 1 or self.is_sliding:
            return None
        if value.shape[3] != query.shape[3] or query.shape[3] > _MOST_CHANNELS:
            return None
        start = self._known_start()
        coded = self._coded() if self.is_initialized else None
        if start is None or (coded is not None and coded != max(0, start - self.window)):
            return None
        causal = mask is None or (mask.dtype is torch.bool and _is_causal(mask, start))
        return start if causal else None

    def _known_start(self) -> int | None:
        """Number of the next token, where the host knows it."""
        return self._length_on_host()

    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Parts,
        residual: Tensor | None,
        key_map: list[Tensor],
        start: int,
        scale: float,
    ) -> Tensor:
        """Store several new tokens and attend to the layer causally: the op `prefill`.

        Args:
            query: [B, Hq, S, D], after RoPE.
            residual: the block's input [B, S, C] while sinks are chosen, else None.
            start: of `prefill_start`.
            others: as in `decode`.

        Returns:
            [B, S, Hq, Dv].
        """
        count = key.shape[2]
        self._check_fits(count)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if self.spec.window:  # codes must not depend on when a token is quantized
            key, value = (as_exact(x, self.spec.exact_dtype).to(x.dtype) for x in (key, value))
        if self.owner is self:
            self._begin_positions(positions, self._start())
        if self.spec.sinks:
            self._choose_sinks(key, value, residual, None, start)
            self._hide_sinks()
        self._make_room(key, value)
        out = ops.prefill(query, key, value, *self._held(key_map, positions, start), scale)
        self._stored(count)
        self._advance(count)
        return out

    def _held(self, key_map: list[Tensor], positions: Parts, start: Tensor | int) -> tuple[object, ...]:
        """The ops' arguments from `history` to `wraps`, for new tokens of which `start` is the first."""
        if positions:
            place = positions[0].flatten(1)[:, -1:]
        else:
            place = torch.zeros((1, 1), dtype=torch.int32, device=self.device)
        k, v = self.spec.key.quantizer, self.spec.value.quantizer
        counted = isinstance(start, Tensor)
        return (
            [t for parts in self.history.parts for t in parts],
            [parts[0] for parts in self.recent.parts] if self.spec.window else [],
            [self.sinks.keys, self.sinks.values, self.sinks.tokens] if self.sinks is not None else [],
            key_map, place, start if counted else None, 0 if counted else start,
            k.bits, v.bits, k.group, v.group, k.clip, v.clip, k.scheme, self.window, self.is_sliding,
        )  # fmt: skip

    def _ahead(self) -> int:
        """Tokens of the window that have their codes already: the next step can then read them at once."""
        return 1 if self.window else 0

    def _length_on_host(self) -> int:
        """Tokens held, in growing layers."""
        return 0

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        """See that the history has slots for these new tokens."""

    def _stored(self, count: int) -> None:
        """Keep count of tokens that an op has written."""
        end = self._start() + count
        self.recent.counted(end)
        if isinstance(self.history, RingStore):
            self.history.counted(end - self.window)
        else:
            self.history.length = max(0, end - self.window)
        if isinstance(end, int):
            self.exact_from = max(self.exact_from, end - self.recent.size)

    def _check_fits(self, count: int) -> None:
        """Raise where `count` new tokens have no room."""

    def _begin_positions(self, positions: Parts, start: Tensor | int) -> None:
        if not positions:
            return
        if isinstance(
            self.history, RingStore
        ):  # every row gets the keys' batch: buffers take any later step's
            positions = tuple(p.expand(self.batch_size, *p.shape[1:]) for p in positions)
        if self.positions is None:
            store = self._store(tuple(as_it_is(p) for p in positions), self._capacity())
            store.allocate(positions)
            self.positions = PositionStore(store, self.is_sliding)
        self.positions.begin(positions, start)

    def _places(self, numbers: Tensor) -> Parts:
        return self.owner.positions.at(numbers) if self.owner.positions is not None else ()

    def _coded(self) -> int | None:
        """Number of the first token without codes, in growing layers."""
        return self.history.end if isinstance(self.history, GrowingStore) else None

    def _write(self, key: Tensor, value: Tensor, new: Tensor, form: KeyForm) -> None:
        """New tokens go to the recent ones, and those that leave the window to the history; without a window,
        at once.
        """
        start = self._start()
        if not self.spec.window:
            coded = form.to_codes(key, self._places(new)), form.values_to_codes(value)
            self.history.push(coded, start)
            return
        keys, values, numbers, leaving = self._leaving(key, value, new)
        if leaving >= 0:
            coded = leaving + self._ahead()
            moved = form.to_codes(keys[:, :, :coded], self._places(numbers[:coded]))
            first = start + new.shape[0] - numbers.shape[0]
            self.history.push((moved, form.values_to_codes(values[:, :, :coded])), first)
            if isinstance(self.history, RingStore):
                self.history.counted(first + leaving)
            else:
                self.history.drop_last(self._ahead())
        self.recent.push(tuple(as_exact(x, self.spec.exact_dtype) for x in (key, value)), start)
        if isinstance(start, int):
            self.exact_from = max(self.exact_from, start + new.shape[0] - self.recent.size)

    def _leaving(self, key: Tensor, value: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Tokens without codes, exact and in order, then the new ones: keys, values and numbers; and how many
        of the first leave the window (in static layers, some may have a negative number); less than none
        where the window is not full.
        """
        start, count, coded = self._start(), new.shape[0], self._coded()
        if coded is None:
            before = torch.arange(-self.window, 0, device=key.device) + start
            leaving = count
        else:
            before = torch.arange(coded, start, device=key.device)
            leaving = start + count - self.window - coded
        if not before.shape[0]:
            return key, value, new, leaving
        keys, values = self.recent.at(before)
        return (
            torch.cat([keys.to(key.dtype), key], 2),
            torch.cat([values.to(value.dtype), value], 2),
            torch.cat([before, new]),
            leaving,
        )

    def _read_history(self, form: KeyForm) -> list[_Axis]:
        if not self.history.parts or not len(self.history):
            return []
        numbers = self.history.columns(self.device)
        keys, values = self.history.read()
        return [_Axis(form.from_codes(keys, self._places(numbers)), values, numbers)]

    def _through_codes(
        self, keys: Tensor, values: Tensor, numbers: Tensor, form: KeyForm
    ) -> tuple[Tensor, Tensor]:
        """Exact tokens as they are read once they are quantized."""
        places = self._places(numbers)
        coded = self.spec.key.decode(self.spec.key.encode(form.to_codes(keys, places)))
        coded_values = self.spec.value.encode(form.values_to_codes(values))
        return form.from_codes(coded, places), self.spec.value.decode(coded_values)

    def _read_before(self, key: Tensor, value: Tensor, new: Tensor, form: KeyForm) -> list[_Axis]:
        """Several new tokens: history and what leaves the window through the codes; exact where there is a
        window.
        """
        # fixed buffers of exact values are read themselves, and about to be written
        history = [_Axis(a.keys.clone(), a.values.clone(), a.numbers) for a in self._read_history(form)]
        if not self.spec.window:
            return [*history, _Axis(*self._through_codes(key, value, new, form), new)]
        keys, values, numbers, leaving = self._leaving(key, value, new)
        leaving = max(0, leaving)
        coded = self._through_codes(keys[:, :, :leaving], values[:, :, :leaving], numbers[:leaving], form)
        return [
            *history,
            _Axis(*coded, numbers[:leaving], "codes"),
            _Axis(keys, values, numbers, "exact"),
        ]

    def _read_after(self, new: Tensor, form: KeyForm) -> list[_Axis]:
        """One new token, or no window: history, then the window."""
        if not self.spec.window:
            return self._read_history(form)
        coded = self._coded()
        if coded is None:
            numbers = torch.arange(1 - self.window, 1, device=self.device) + new[-1]
        else:
            numbers = torch.arange(coded, self._start() + new.shape[0], device=self.device)
        keys, values = (x.to(self.dtype) for x in self.recent.at(numbers))
        return [*self._read_history(form), _Axis(keys, values, numbers)]

    def _choose_sinks(
        self, key: Tensor, value: Tensor, residual: Tensor | None, valid: Tensor | None, start: Tensor | int
    ) -> None:
        if key.shape[2] == 1:
            self.prompt_open = False
        elif self.prompt_open and residual is not None:
            if self.sinks is None:
                self.sinks = SinkStore(self.spec.sinks, key, value, self.spec.exact_dtype)
            self.sinks.choose(residual, valid, key, value, start)

    def _hide_sinks(self) -> None:
        """Mark the sinks' codes for `decode`, which reads sinks from their exact form: a negative scale."""
        if self.sinks is None or self.spec.key.quantizer is None or not self.history.parts:
            return
        scale = self.history.parts[0][1]
        tokens = self.sinks.tokens.long()
        held = torch.arange(scale.shape[2], device=scale.device)
        numbers = self.history.columns(self.device, self._ahead()) if self.is_sliding else held
        hidden = (tokens[:, :, None] == numbers[: scale.shape[2]]).any(1)[:, None]
        kept = scale[:, :, : hidden.shape[2]]
        kept.copy_(torch.where(hidden, -kept.abs(), kept.abs()))

    def _joined(self, axes: list[_Axis], mask: Tensor | None, new: Tensor, columns: int, offset: int) -> Step:
        """One token axis of several stretches, with sinks restored and the mask of its columns."""
        keys = torch.cat([a.keys for a in axes], 2)
        values = torch.cat([a.values for a in axes], 2)
        numbers = torch.cat([a.numbers for a in axes])
        two_forms = any(a.form != "any" for a in axes)
        in_order = not two_forms and keys.shape[2] == columns and self._in_order()
        if self.sinks is not None:
            coded = torch.cat(
                [torch.full_like(a.numbers, -2) if a.form == "exact" else a.numbers for a in axes]
            )
            keys, values = self.sinks.restore(keys, values, offset if in_order else coded)
        # without a mask, columns after the newest token must still be hidden
        if not in_order or (mask is None and isinstance(self.history, RingStore)):
            mask = columns_of_mask(mask, new, numbers, offset)
            if two_forms:
                mask = _one_form_each(mask, axes, new, self.spec.window)
        return Step(keys, values, self._places(numbers), mask)

    def _in_order(self) -> bool:
        """Whether columns are in the order of tokens whenever there are as many as the mask has."""
        return isinstance(self.history, GrowingStore)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise: only rewritten attention modules may write to a packed layer.

        Raises:
            StateError: always.
        """
        raise StateError(
            "an attention module that was not transformed wrote to a packed cache layer; use the cache with "
            "the model that filled it, or a new cache."
        )

    def _own_stores(self) -> list[Store]:
        """Stores that an operation on this layer changes: shared positions belong to their owner."""
        if not self.is_initialized:
            return []
        if self.positions is None:
            return [self.history, self.recent]
        self.positions.settle()
        return [self.history, self.recent, self.positions.store]

    def _change_batch(self, batch: int, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation once to each tensor; rows that the whole batch shares (batch 1) stay.

        Args:
            batch: number of sequences afterwards.
        """
        if not self.is_initialized:
            return
        for store in self._own_stores():
            store.map_batch(lambda t: function(t) if t.shape[0] == self.batch_size else t)
        if self.sinks is not None:
            self.sinks.map_batch(function)
        self.batch_size = batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._change_batch(beam_idx.shape[0], lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.is_initialized:
            self._change_batch(self.batch_size * repeats, lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices`."""
        if self.is_initialized:
            kept = torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()]
            self._change_batch(kept.shape[0], lambda t: t[indices])

    def offload(self) -> None:
        """Raise: packed layers stay on their device.

        Raises:
            StateError: always.
        """
        raise StateError("a packed cache cannot be offloaded; use a cache without offloading.")

    def prefetch(self) -> None:
        """Nothing to do: packed layers stay on their device."""

    def stored_tensors(self) -> list[Tensor]:
        """Every tensor the layer holds; shared positions are listed by their owner."""
        if not self.is_initialized:
            return []
        owned = self.positions.tensors() if self.positions is not None else []
        sinks = self.sinks.tensors() if self.sinks is not None else ()
        return [*self.history.tensors(), *self.recent.tensors(), *owned, *sinks]


def visible_to_itself(mask: Tensor | None, columns: Tensor) -> Tensor | None:
    """[B or 1, S] of whether each new token sees its own column: False marks padding."""
    if mask is None:
        return None
    itself = mask[:, 0].gather(-1, columns.view(1, -1, 1).expand(mask.shape[0], -1, 1)).squeeze(-1)
    return masks.as_bool(itself)


def _is_causal(mask: Tensor, start: int) -> bool:
    """Whether a bool mask [B or 1, 1, S, K] shows query a the columns up to start + a, and no others; one
    synchronisation.
    """
    if torch.compiler.is_compiling() or mask.shape[1] != 1:
        return False
    count = torch.arange(mask.shape[2], device=mask.device) + (start + 1)
    whole = (mask.sum(-1) == count).all() & ~mask.triu(start + 1).any()
    return bool(whole)


def columns_of_mask(mask: Tensor | None, queries: Tensor, numbers: Tensor, offset: Tensor | int) -> Tensor:
    """The mask for columns that hold given tokens.

    Args:
        mask: [B or 1, 1 or H, S, K] whose column c stands for token offset + c; None for a causal one.
        queries: int64 [S], tokens that ask.
        numbers: int64 [N], tokens of the new columns, negative where empty.

    Returns:
        [B or 1, 1 or H, S, N]; columns that the mask has no word for are hidden.
    """
    if mask is None:
        return ((numbers >= 0) & (numbers <= queries[:, None]))[None, None]
    index = numbers - offset
    known = (numbers >= 0) & (index >= 0) & (index < mask.shape[-1])
    chosen = mask.index_select(-1, index.clamp(0, mask.shape[-1] - 1))
    return _hide(chosen, ~known)


def _one_form_each(mask: Tensor, axes: list[_Axis], queries: Tensor, window: int) -> Tensor:
    """Show each query the exact form of tokens inside its window, and the other form elsewhere."""
    hidden = []
    for axis in axes:
        outside = axis.numbers <= queries[:, None] - window
        hidden.append({"any": torch.zeros_like(outside), "codes": ~outside, "exact": outside}[axis.form])
    return _hide(mask, torch.cat(hidden, -1))


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
