"""Where tokens are kept: a store that grows, and a ring of fixed buffers.

Both hold several fields (keys and values; or positions), each with its codec, and know the number in the
sequence of the token in each of their columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotatekv_fx.cache.codec import Codec, Parts


class GrowingStore:
    """Concatenates. Keeps at most the last `limit` tokens, where given.

    Attributes:
        parts: per field, the stored tensors.
        first: number of the token in column 0.
    """

    def __init__(self, codecs: tuple[Codec, ...], limit: int | None = None):
        self.codecs, self.limit, self.first = codecs, limit, 0
        self.parts: tuple[Parts, ...] = ()

    def __len__(self) -> int:
        return self.parts[0][0].shape[2] if self.parts else 0

    def allocate(self, fields: tuple[Tensor, ...]) -> None:
        """Nothing to do: it grows."""

    def push(self, fields: tuple[Tensor, ...], start: int) -> None:
        """Append tokens [B, H, S, D] a field, the first of which is number `start`."""
        new = tuple(c.encode(x) for c, x in zip(self.codecs, fields, strict=True))
        if not len(self):
            self.parts, self.first = new, start
        else:
            self.parts = tuple(_concatenate(a, b) for a, b in zip(self.parts, new, strict=True))
        if self.limit is not None:
            self.drop_first(len(self) - self.limit)

    def drop_first(self, count: int) -> None:
        """Forget the oldest `count` tokens (none if negative)."""
        if count > 0:
            self._map(lambda t: t[:, :, count:].clone())
            self.first += count

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` tokens, or all."""
        kept = max(0, len(self) - count)
        if count > 0 and self.parts:
            self._map(lambda t: t[:, :, :kept].clone())

    def overflow(self, new: int) -> int:
        """How many of the oldest tokens leave when `new` ones come."""
        return 0 if self.limit is None else max(0, len(self) + new - self.limit)

    def last(self, start: int, device: torch.device) -> Tensor:
        """Numbers of the held tokens in order, all before token `start`."""
        return self.columns(device)

    def read(self) -> tuple[Tensor, ...]:
        """Every token [B, H, N, D], a field each."""
        return tuple(c.decode(p) for c, p in zip(self.codecs, self.parts, strict=True))

    def columns(self, device: torch.device) -> Tensor:
        """Number of the token in each column, int64 [N]."""
        return torch.arange(self.first, self.first + len(self), device=device)

    def at(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Tokens by number, int64 [M]; a number that is not held gives some other token."""
        index = (numbers - self.first).clamp(0, max(len(self) - 1, 0))
        return tuple(x.index_select(2, index) for x in self.read())

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [t for parts in self.parts for t in parts]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation to each tensor; one that holds the same row for the whole batch stays."""
        self._map(function)

    def reset(self) -> None:
        """Forget everything."""
        self.parts, self.first = (), 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.parts = tuple(tuple(function(t) for t in parts) for parts in self.parts)


class RingStore:
    """Fixed buffers of `size` tokens, written in place: token n is in column n % size.

    A store that does not wrap takes tokens below `size` only; index_copy_ refuses others.
    `count` [] is how many tokens the sequence has, those of negative number left out; it says which columns
    are filled.
    """

    def __init__(self, codecs: tuple[Codec, ...], size: int, wraps: bool):
        self.codecs, self.size, self.wraps = codecs, size, wraps
        self.parts: tuple[Parts, ...] = ()
        self.count: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    def allocate(self, fields: tuple[Tensor, ...]) -> None:
        """Make buffers for tensors like `fields` ([B, H, any, D] each)."""
        sample = (c.encode(x[:, :, :1]) for c, x in zip(self.codecs, fields, strict=True))
        self.parts = tuple(
            tuple(t.new_zeros((*t.shape[:2], self.size, *t.shape[3:])) for t in parts) for parts in sample
        )
        self.count = torch.zeros((), dtype=torch.int64, device=fields[0].device)
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors(), self.count):
                torch._dynamo.mark_static_address(tensor)

    def push(self, fields: tuple[Tensor, ...], start: Tensor | int) -> None:
        """Write tokens [B, H, S, D] a field, the first of which is number `start`.

        Tokens with a negative number fill columns that are written again before they are read.
        """
        length = fields[0].shape[2]
        written = min(length, self.size)
        if written:
            numbers = torch.arange(length - written, length, device=fields[0].device) + start
            slots = (
                numbers % self.size if self.wraps else torch.where(numbers < 0, numbers + self.size, numbers)
            )
            for codec, parts, x in zip(self.codecs, self.parts, fields, strict=True):
                codec.write(parts, x[:, :, length - written :], slots)
        self.count.copy_(torch.as_tensor(start, device=self.count.device) + length)

    def overflow(self, new: int) -> int:
        """How many tokens leave when `new` ones come: as many, some of which may have a negative number."""
        return new

    def last(self, start: Tensor | int, device: torch.device) -> Tensor:
        """Numbers of the `size` tokens before token `start`, negative where there are none."""
        return torch.arange(-self.size, 0, device=device) + start

    def read(self) -> tuple[Tensor, ...]:
        """Every column [B, H, size, D], a field each."""
        return tuple(c.decode(p) for c, p in zip(self.codecs, self.parts, strict=True))

    def columns(self, device: torch.device) -> Tensor:
        """Number of the token in each column, int64 [size]; negative where it is empty."""
        newest = self.count - 1
        return newest - (newest - torch.arange(self.size, device=device)) % max(self.size, 1)

    def at(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Tokens by number, int64 [M]; a number that is not held gives some other token."""
        index = numbers % max(self.size, 1)
        return tuple(x.index_select(2, index) for x in self.read())

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [t for parts in self.parts for t in parts]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation that keeps the batch size, in place."""
        for tensor in self.tensors():
            tensor.copy_(function(tensor))

    def reset(self) -> None:
        """Forget everything, in place."""
        for tensor in self.tensors():
            tensor.zero_()
        if self.count is not None:
            self.count.zero_()


def _concatenate(old: Parts, new: Parts) -> Parts:
    """Concatenate tokens; a tensor that came once for the whole batch is repeated when the other is not."""
    joined = []
    for a, b in zip(old, new, strict=True):
        batch = max(a.shape[0], b.shape[0])
        joined.append(torch.cat([a.expand(batch, *a.shape[1:]), b.expand(batch, *b.shape[1:])], 2))
    return tuple(joined)


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
