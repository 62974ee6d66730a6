"""Where tokens are kept: a store that grows, and a ring.

Both hold several fields (keys and values; or positions), each with its codec, and know the number in the
sequence of the token in each of their columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotatekv_fx.cache.codec import Codec, Parts

_LEAST_GROWTH = 64  # tokens
_GROWTH_SHARE = 16  # of the tokens held
_ALIGNED = 16  # sizes that are multiples of it share compiled kernels


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _grown(tokens: int) -> int:
    """Slots for so many tokens, and some ahead."""
    return _aligned(tokens + max(_LEAST_GROWTH, tokens // _GROWTH_SHARE))


class GrowingStore:
    """Buffers that grow ahead of the tokens, by a sixteenth. Keeps at most the last `limit` tokens, if given.

    Attributes:
        parts: per field, the stored tensors, longer than the tokens held.
        first: number of the token in column 0.
    """

    def __init__(self, codecs: tuple[Codec, ...], limit: int | None = None):
        self.codecs, self.limit, self.first, self.length = codecs, limit, 0, 0
        self.parts: tuple[Parts, ...] = ()

    def __len__(self) -> int:
        return self.length

    @property
    def end(self) -> int:
        """Number of the token after the newest."""
        return self.first + self.length

    def allocate(self, fields: tuple[Tensor, ...]) -> None:
        """Nothing to do: it grows."""

    def push(self, fields: tuple[Tensor, ...], start: int) -> None:
        """Append tokens [B, H, S, D] a field, the first of which is number `start`."""
        new = tuple(c.encode(x) for c, x in zip(self.codecs, fields, strict=True))
        count = new[0][0].shape[2]
        if not self.length:
            self.first = start
        if not self.parts or (not self.length and count > self.parts[0][0].shape[2]):
            self.parts, self.length = new, count
        else:
            self.reserve(count)
            self.parts = tuple(self._written(a, b) for a, b in zip(self.parts, new, strict=True))
            self.length += count
        if self.limit is not None:
            self.drop_first(self.length - self.limit)

    def start_with(self, fields: tuple[Tensor, ...], tokens: int) -> None:
        """Make buffers of `tokens` slots, or a few, for tensors like `fields` ([B, H, any, D] each)."""
        sample = (c.encode(x[:, :, :1]) for c, x in zip(self.codecs, fields, strict=True))
        self.parts = tuple(
            tuple(_longer(t, 0, _aligned(tokens or _LEAST_GROWTH)) for t in parts) for parts in sample
        )

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens."""
        needed = self.length + count
        if self.parts and needed > self.parts[0][0].shape[2]:
            # what is over the limit is dropped at once
            size = _grown(needed) if self.limit is None else needed
            self._map(lambda t: _longer(t, t.shape[2], size))

    def _written(self, old: Parts, new: Parts) -> Parts:
        """New tokens copied behind the old; a tensor that came once for the batch is repeated if the other is
        not.
        """
        joined = []
        for a, b in zip(old, new, strict=True):
            batch = max(a.shape[0], b.shape[0])
            if a.shape[0] < batch:
                a = a.expand(batch, *a.shape[1:]).clone()
            a[:, :, self.length : self.length + b.shape[2]] = b
            joined.append(a)
        return tuple(joined)

    def drop_first(self, count: int) -> None:
        """Forget the oldest `count` tokens (none if negative)."""
        if count > 0:
            self._map(lambda t: t[:, :, count : self.length].clone())
            self.first += count
            self.length -= count

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens, or all."""
        self.length = max(0, self.length - max(count, 0))

    def read(self) -> tuple[Tensor, ...]:
        """Every token [B, H, N, D], a field each."""
        held = (tuple(t[:, :, : self.length] for t in parts) for parts in self.parts)
        return tuple(c.decode(p) for c, p in zip(self.codecs, held, strict=True))

    def columns(self, device: torch.device, ahead: int = 0) -> Tensor:
        """Number of the token in each column, int64 [N]; `ahead` counts tokens behind the newest."""
        return torch.arange(self.first, self.end + ahead, device=device)

    def at(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Tokens by number, int64 [M]; a number that is not held gives some other token."""
        index = (numbers - self.first).clamp(0, max(self.length - 1, 0))
        return tuple(x.index_select(2, index) for x in self.read())

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [t for parts in self.parts for t in parts]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation to each tensor; one that holds the same row for the whole batch stays."""
        self._map(function)

    def reset(self) -> None:
        """Forget everything."""
        self.parts, self.first, self.length = (), 0, 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.parts = tuple(tuple(function(t) for t in parts) for parts in self.parts)


def _longer(tensor: Tensor, held: int, size: int) -> Tensor:
    longer = tensor.new_zeros((*tensor.shape[:2], size, *tensor.shape[3:]))
    longer[:, :, :held] = tensor[:, :, :held]
    return longer


class RingStore:
    """Buffers of `size` tokens, written in place: token n is in column n % size.

    A store that does not wrap takes tokens below `size` only; index_copy_ refuses others. One that `grows` is
    short at first: until its size is its `limit`, no token has gone around.
    `count` is how many tokens the sequence has, those of negative number left out; it says which columns are
    filled. A tensor [] where the buffers are `fixed` (a static cache), so that a compiled step can change it.
    """

    def __init__(self, codecs: tuple[Codec, ...], limit: int, wraps: bool, fixed: bool, grows: bool = False):
        self.codecs, self.limit, self.wraps, self.fixed = codecs, limit, wraps, fixed
        self.size = min(limit, _LEAST_GROWTH) if grows else limit
        self.parts: tuple[Parts, ...] = ()
        self.count: Tensor | int = 0

    def __len__(self) -> int:
        return self.size

    def allocate(self, fields: tuple[Tensor, ...]) -> None:
        """Make buffers for tensors like `fields` ([B, H, any, D] each)."""
        sample = (c.encode(x[:, :, :1]) for c, x in zip(self.codecs, fields, strict=True))
        self.parts = tuple(
            tuple(t.new_zeros((*t.shape[:2], self.size, *t.shape[3:])) for t in parts) for parts in sample
        )
        if self.fixed:
            self.count = torch.zeros((), dtype=torch.int64, device=fields[0].device)
            if not torch.compiler.is_compiling():
                for tensor in (*self.tensors(), self.count):
                    torch._dynamo.mark_static_address(tensor)

    def push(self, fields: tuple[Tensor, ...], start: Tensor | int) -> None:
        """Write tokens [B, H, S, D] a field, the first of which is number `start`.

        Tokens with a negative number fill columns that are written again before they are read.
        """
        length = fields[0].shape[2]
        if self.size < self.limit:
            self.reserve(start + length)
        written = min(length, self.size)
        if written:
            numbers = torch.arange(length - written, length, device=fields[0].device) + start
            around = numbers % self.size
            slots = around if self.wraps else torch.where(numbers < 0, around, numbers)
            for codec, parts, x in zip(self.codecs, self.parts, fields, strict=True):
                codec.write(parts, x[:, :, length - written :], slots)
        self.counted(start + length)

    def reserve(self, end: int) -> None:
        """Make room for the tokens before number `end`, in a store that grows."""
        if self.size < min(end, self.limit):
            self.size = min(self.limit, _grown(end))
            self.parts = tuple(
                tuple(_longer(t, t.shape[2], self.size) for t in parts) for parts in self.parts
            )

    def unrolled(self, most: int) -> GrowingStore:
        """The last tokens, `most` at most, in a store that keeps as many; the count is known on the host."""
        held = max(0, min(self.count, most))
        store = GrowingStore(self.codecs, most)
        store.first, store.length = max(0, self.count) - held, held
        columns = store.columns(self.parts[0][0].device) % self.size
        store.parts = tuple(tuple(t.index_select(2, columns) for t in parts) for parts in self.parts)
        return store

    def counted(self, count: Tensor | int) -> None:
        """Say how many tokens the sequence has now."""
        if isinstance(self.count, Tensor):
            self.count.copy_(torch.as_tensor(count, device=self.count.device))
        else:
            self.count = count

    def read(self) -> tuple[Tensor, ...]:
        """Every column [B, H, size, D], a field each."""
        return tuple(c.decode(p) for c, p in zip(self.codecs, self.parts, strict=True))

    def columns(self, device: torch.device, ahead: int = 0) -> Tensor:
        """Number of the token in each column, int64 [size], negative where it is empty; `ahead` counts tokens
        behind the newest.
        """
        newest = self.count - 1 + ahead
        return newest - (newest - torch.arange(self.size, device=device)) % max(self.size, 1)

    def at(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Tokens by number, int64 [M]; a number that is not held gives some other token."""
        index = numbers % max(self.size, 1)
        return tuple(x.index_select(2, index) for x in self.read())

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [t for parts in self.parts for t in parts]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation; in place where the buffers are fixed, and the batch size with them."""
        if self.fixed:
            for tensor in self.tensors():
                tensor.copy_(function(tensor))
        else:
            self.parts = tuple(tuple(function(t) for t in parts) for parts in self.parts)

    def reset(self) -> None:
        """Forget everything, in place."""
        for tensor in self.tensors():
            tensor.zero_()
        self.counted(0)


class PositionStore:
    """Positions of a sequence's tokens, held once for the layers that share them.

    Where a sliding window drops tokens (`sliding`), rows of a step with several tokens stay `pending` until
    the next step, so that every layer of the step still finds the tokens that are about to be dropped.
    """

    def __init__(self, store: GrowingStore | RingStore, sliding: bool):
        self.store, self.sliding = store, sliding
        self.pending: tuple[tuple[Tensor, ...], Tensor | int] | None = None

    def begin(self, positions: tuple[Tensor, ...], start: Tensor | int) -> None:
        """Take the positions [B or 1, 1, S, ...] of a step, the first of which is token `start`."""
        self.settle()
        if self.sliding and positions[0].shape[2] > 1:
            self.pending = positions, start
        else:
            self.store.push(positions, start)

    def settle(self) -> None:
        """Store what is pending."""
        if self.pending is not None:
            self.store.push(*self.pending)
            self.pending = None

    def at(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Positions [B or 1, 1, N, ...] of tokens by number, int64 [N]."""
        if self.pending is None:
            return self.store.at(numbers)
        new, start = self.pending
        index = (numbers - start).clamp(0, new[0].shape[2] - 1)
        chosen = tuple(p.index_select(2, index) for p in new)
        if not len(self.store):
            return chosen
        recent = (numbers >= start).view(1, 1, -1, 1)
        return tuple(torch.where(recent, a, b) for a, b in zip(chosen, self.store.at(numbers), strict=True))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.store.tensors(), *(self.pending[0] if self.pending is not None else ())]
