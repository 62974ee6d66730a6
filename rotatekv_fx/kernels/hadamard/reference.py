"""Hadamard matrices and the rotation of grouped heads, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx.errors import ConfigError


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sylvester's Walsh-Hadamard matrix divided by sqrt(n): symmetric, orthogonal, its own inverse.

    Args:
        n: order, a power of two.

    Returns:
        [n, n], computed in float64 and rounded once to `dtype`.

    Raises:
        ConfigError: `n` is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ConfigError(
            f"hadamard order is {n}; use a power of two, or hadamard_or_block for other orders."
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(pair, matrix)
    return (matrix / n**0.5).to(dtype)


def hadamard_or_block(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`hadamard(n)` for a power of two; for n = 2^a * c with c odd, c copies of H_{2^a} on the diagonal.

    Args:
        n: order, at least 1.

    Returns:
        [n, n], symmetric and orthogonal.

    Raises:
        ConfigError: `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"hadamard order is {n}; use a whole number of at least 1.")
    power = n & -n
    return torch.block_diag(*[hadamard(power, dtype)] * (n // power))


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
