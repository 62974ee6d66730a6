"""How one tensor of tokens is stored: as codes, or as it is.

Every stored tensor has the batch at axis 0 and tokens at axis 2, so that stores treat them alike:
codes [B, Ng, N, bytes], scale [B, Ng, N] and offset [B, Ng, N]; or, exact, [B, H, N, D].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rotatekv_fx.recipes.base import Quantizer

ops = torch.ops.rotatekv
Parts = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Codec:
    """Stores [B, H, S, D] as codes, or as it is where `quantizer` is None.

    Attributes:
        heads: H.
        dtype: of what is read back.
        order: the channel whose code lies in each place (op `quantize`), or None.
    """

    quantizer: Quantizer | None
    heads: int
    dtype: torch.dtype
    order: Tensor | None = None

    def on(self, device: torch.device) -> Codec:
        """The codec for tensors of a device."""
        return self if self.order is None else dataclasses.replace(self, order=self.order.to(device))

    def encode(self, x: Tensor) -> Parts:
        """[B, H, S, D] -> stored tensors."""
        if self.quantizer is None:
            return (x,)
        q = self.quantizer
        return ops.quantize(x, q.bits, q.group, q.clip, q.scheme, self.order)

    def decode(self, parts: Parts) -> Tensor:
        """Stored tensors -> [B, H, N, D]."""
        if self.quantizer is None:
            return parts[0]
        q, (codes, scale, offset) = self.quantizer, parts
        # a negative scale hides a sink's codes from `decode`; a token that was one is read from them
        return ops.dequantize(codes, scale.abs(), offset, q.bits, q.group, self.heads, self.dtype, self.order)

    def write(self, parts: Parts, x: Tensor, slots: Tensor) -> None:
        """Store [B, H, S, D] in place at token slots int64 [S]."""
        if self.quantizer is None:
            ops.store(parts[0], x, slots)
        else:
            q = self.quantizer
            ops.append(*parts, x, slots, q.bits, q.group, q.clip, q.scheme, self.order)


def as_it_is(x: Tensor) -> Codec:
    """The codec that stores tensors like `x` unchanged."""
    return Codec(None, x.shape[1], x.dtype)


def as_exact(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to the dtype of exact tokens, stopping at its largest value."""
    if x.dtype is dtype:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
