"""Products with packed codes that never unpack them one by one.

A byte x holds `8 / width` digits. With f_i = floor(x / 2^(width i)), digit i is f_i - 2^width f_(i+1), so a
product with digits is a few products with f_0, f_1, ...: one cast and one rounding a byte and plane, where
unpacking takes several operations a digit. Which channel a digit belongs to: the byte layout at the op
`quantize` (`rotatekv_fx.ops`).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rotatekv_fx.kernels.quantize.reference import padded_group


def key_products(codes: Tensor, bits: int, weight: Tensor) -> Tensor:
    """codes . weight of every token and group.

    Args:
        codes: uint8 [B, Ng, N, bytes].
        bits: of a code.
        weight: [B, Ng, group, R].

    Returns:
        fp32 [B, Ng, N, R].
    """
    group = weight.shape[2]
    weight = torch.nn.functional.pad(weight, (0, 0, 0, padded_group(group, bits) - group))
    if bits != 3:
        return _key_plane(codes, bits, weight)
    low = weight.shape[2] // 4
    return _key_plane(codes[..., :low], 2, weight) + 4.0 * _key_plane(codes[..., low:], 1, weight)


def _key_plane(codes: Tensor, width: int, weight: Tensor) -> Tensor:
    parts = weight.chunk(8 // width, dim=2)
    total = None
    for i, floored in enumerate(_floors(codes, width)):
        part = parts[i] if i == 0 else parts[i] - 2.0**width * parts[i - 1]
        product = floored @ part
        total = product if total is None else total + product
    return total


def value_products(probability: Tensor, codes: Tensor, bits: int, group: int) -> Tensor:
    """probability . codes, a sum over tokens.

    Args:
        probability: [B, Ng, R, N].
        codes: uint8 [B, Ng, N, bytes].
        bits: of a code.
        group: channels of a group.

    Returns:
        fp32 [B, Ng, R, group].
    """
    if bits != 3:
        return _value_plane(probability, codes, bits)[..., :group]
    low = padded_group(group, bits) // 4
    plane = _value_plane(probability, codes[..., :low], 2)
    return (plane + 4.0 * _value_plane(probability, codes[..., low:], 1))[..., :group]


def _value_plane(probability: Tensor, codes: Tensor, width: int) -> Tensor:
    """Sums of digits. Bytes are read less 128, which keeps the sums that are subtracted small."""
    sums = [probability @ floored for floored in _floors(codes, width, 128.0)]
    digits = [a - 2.0**width * b for a, b in itertools.pairwise(sums)]
    return torch.cat([*digits, sums[-1] + 2.0 ** (width - 1) * probability.sum(-1, keepdim=True)], -1)


def _floors(codes: Tensor, width: int, less: float = 0.0) -> list[Tensor]:
    x = codes.float() - less if less else codes.float()
    return [x, *(torch.floor(x * 2.0 ** (-width * i)) for i in range(1, 8 // width))]
