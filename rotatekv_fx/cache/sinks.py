"""Attention sinks: a few tokens of the prompt whose keys and values stay exact.

Chosen by the largest |values| of the block's input over the whole prompt (RotateKV, arXiv 2501.16383, on
massive activations); a chunked prefill keeps a running choice, and a token that drops out of it is read from
its codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotatekv_fx.cache.codec import as_exact

ops = torch.ops.rotatekv


class SinkStore:
    """Exact keys and values of at most `count` tokens a sequence.

    Attributes:
        scores: fp32 [B, count], the |value| that named the token, -1 for an unused slot.
        tokens: int32 [B, count], the token's index in the sequence, each once; -1 for an unused slot.
        keys, values: [B, Hkv, count, D] in 16 bit, in the form that the layer stores.
    """

    def __init__(self, count: int, key: Tensor, value: Tensor, dtype: torch.dtype):
        batch, heads = key.shape[:2]
        self.scores = key.new_full((batch, count), -1.0, dtype=torch.float32)
        self.tokens = key.new_full((batch, count), -1, dtype=torch.int32)
        self.keys = key.new_zeros((batch, heads, count, key.shape[-1]), dtype=dtype)
        self.values = value.new_zeros((batch, heads, count, value.shape[-1]), dtype=dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors held, batch at axis 0."""
        return self.scores, self.tokens, self.keys, self.values

    def choose(
        self, residual: Tensor, valid: Tensor | None, key: Tensor, value: Tensor, start: Tensor | int
    ) -> None:
        """Let new tokens of the prompt compete with the chosen ones.

        Args:
            residual: [B, S, C], the block's input.
            valid: bool [B, S], False for padding, or None.
            key, value: [B, Hkv, S, D] of the same tokens.
            start: index of the first of them in the sequence.
        """
        count = self.scores.shape[1]
        scores, local = ops.select_sinks(residual, valid, count)
        scores = torch.cat([self.scores, scores], 1)
        tokens = torch.cat([self.tokens, torch.where(scores[:, count:] < 0, -1, local + start).int()], 1)
        self.scores.copy_(scores.topk(count, 1).values)
        best = scores.topk(count, 1).indices
        self.tokens.copy_(_once(tokens.gather(1, best)))
        for store, new in ((self.keys, key), (self.values, value)):
            rows = as_exact(ops.take_tokens(new, local), store.dtype)
            store.copy_(ops.take_tokens(torch.cat([store, rows], 2), best))

    def restore(self, keys: Tensor, values: Tensor, numbers: Tensor | int) -> tuple[Tensor, Tensor]:
        """Put the exact rows in [B, Hkv, N, D] keys and values.

        Args:
            numbers: int64 [N], the token in each column; or the token in column 0 where they are in order.
        """
        tokens = self.tokens.long()
        if isinstance(numbers, Tensor):
            match = tokens[:, :, None] == numbers
            slots = torch.where((tokens >= 0) & match.any(-1), match.int().argmax(-1), -1)
        else:
            slots = torch.where(tokens < 0, -1, tokens - numbers)
        return ops.restore_sinks(keys, self.keys, slots), ops.restore_sinks(values, self.values, slots)

    def drop_from(self, length: int) -> None:
        """Forget tokens from number `length` on."""
        gone = self.tokens >= length
        self.scores.masked_fill_(gone, -1.0)
        self.tokens.masked_fill_(gone, -1)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function(tensor)`, which works on the batch axis."""
        self.scores, self.tokens, self.keys, self.values = (function(t) for t in self.tensors())

    def reset(self) -> None:
        """Forget all tokens, in place."""
        self.scores.fill_(-1.0)
        self.tokens.fill_(-1)


def _once(tokens: Tensor) -> Tensor:
    """[B, count] with -1 in place of a token that an earlier slot names too."""
    same = tokens[:, :, None] == tokens[:, None]
    return torch.where(same.tril(-1).any(-1), -1, tokens)
