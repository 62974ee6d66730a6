"""Rotation of grouped heads, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, matrix: Tensor, order: Tensor | None, inverse: bool) -> Tensor:
    """Reference of the op `rotatekv::rotate` (`rotatekv_fx.ops` describes it)."""
    batch, heads, tokens, dim = x.shape
    channels, block = heads * dim, matrix.shape[-1]
    flat = x.float().transpose(1, 2).reshape(batch, tokens, channels)
    if order is not None and inverse:
        positions = torch.arange(channels, device=order.device)
        flat = flat[..., torch.zeros_like(order).scatter(0, order, positions)]
    blocks = flat.reshape(batch, tokens, channels // block, block)
    if matrix.shape[0] == 1:
        turned = blocks @ matrix[0].float()
    else:
        turned = torch.einsum("bsnm,nmk->bsnk", blocks, matrix.float())
    flat = turned.reshape(batch, tokens, channels)
    if order is not None and not inverse:
        flat = flat[..., order]
    return flat.reshape(batch, tokens, heads, dim).transpose(1, 2).to(x.dtype).contiguous()
