"""Rounding with error feedback in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx.kernels.quantize.reference import midpoint_grid


def compensate(x: Tensor, feedback: Tensor, bits: int, group: int, clip: float) -> Tensor:
    """Reference of the op `rotatekv::compensate` (`rotatekv_fx.ops` describes it)."""
    batch, heads, tokens, dim = x.shape
    size = feedback.shape[-1]
    values = x.float().transpose(1, 2).flatten(2)
    grouped = values.unflatten(-1, (-1, group))
    high, low = grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True)
    scale, offset = midpoint_grid(high, low, bits, clip)
    # channel of a block first, so that a step reads and writes whole rows
    low, high, scale, offset = (
        t.expand_as(grouped).flatten(-2).unflatten(-1, (-1, size)).movedim(-1, 0).contiguous()
        for t in (low, high, scale, offset.float())
    )
    values = values.unflatten(-1, (-1, size)).movedim(-1, 0).contiguous()  # [m, B, S, n]
    weights = feedback.float().permute(1, 2, 0)[:, :, None, None]  # [m, m, 1, 1, n]
    wanted, errors = torch.empty_like(values), torch.empty_like(values)
    for i in range(size - 1, -1, -1):
        exact = values[i]
        shifted = (exact - (errors[i + 1 :] * weights[i, i + 1 :]).sum(0)).clamp(low[i], high[i])
        wanted[i] = torch.where((exact > low[i]) & (exact < high[i]), shifted, exact)
        codes = torch.round((wanted[i] - offset[i]) / scale[i]).clamp(0, 2**bits - 1)
        errors[i] = offset[i] + scale[i] * codes - exact
    by_token = wanted.movedim(0, -1).reshape(batch, tokens, heads, dim)
    return by_token.transpose(1, 2).contiguous()
