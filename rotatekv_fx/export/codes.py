"""Packed codes as numbers, and products with them that never unpack them one by one.

A byte x holds n = `8 / width` digits. Shifted left by i digits it keeps its lowest n - i, as g_i = 2^(width
i) x modulo 256. With r_i = g_i / 2^(width i), digit n - 1 - i is (r_i - r_(i+1)) / 2^(width (n - 1 - i)),
so a product with digits is a sum of products with g_0, g_1, ...: one multiplication of bytes a plane, where
unpacking takes several operations a digit. Which channel a digit belongs to: the byte layout at the op
`quantize` (`rotatekv_fx.ops`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotatekv_fx.kernels.quantize.reference import padded_group


def regroup(x: Tensor, channels: int) -> Tensor:
    """[B, P, N, c] -> [B, P c / channels, N, channels]: a token's channels stay in their order."""
    each = x.shape[3]
    if each == channels:
        return x
    if each % channels == 0:
        return x.unflatten(3, (each // channels, channels)).transpose(2, 3).flatten(1, 2)
    if channels % each == 0:
        return x.unflatten(1, (-1, channels // each)).transpose(2, 3).flatten(3)
    return regroup(regroup(x, math.gcd(each, channels)), channels)


def levels(codes: Tensor, bits: int, group: int) -> Tensor:
    """uint8 [B, Ng, bytes, N] -> codes as numbers, fp32 [B, Ng, N, group]."""
    if bits != 3:
        return _plane_levels(codes, bits)[..., :group]
    low = padded_group(group, bits) // 4
    return (_plane_levels(codes[:, :, :low], 2) + 4.0 * _plane_levels(codes[:, :, low:], 1))[..., :group]


def _plane_levels(codes: Tensor, width: int) -> Tensor:
    places = torch.tensor([2 ** (width * i) for i in range(8 // width)], device=codes.device)
    masks = ((2**width - 1) * places).to(torch.uint8)
    masked = codes[:, :, None] & masks[:, None, None]  # each digit where it is in its byte
    units = (1.0 / places).repeat_interleave(codes.shape[2])
    return masked.flatten(2, 3).transpose(2, 3).float() * units


def key_products(weight: Tensor, codes: Tensor, bits: int) -> Tensor:
    """weight . codes of every token and group.

    The weights are split into multiples of a step, a power of two, and a rest. Products of bytes with the
    former are exact in fp32, and the rest is small: the large numbers that cancel leave no rounding errors.

    Args:
        weight: [B, Ng, R, group].
        codes: uint8 [B, Ng, bytes, N].
        bits: of a code.

    Returns:
        fp32 [B, Ng, R, N].
    """
    group = weight.shape[3]
    # adding a large number rounds to its steps; the sums of 32 bytes times such weights stay below 2^24 steps
    large = torch.linalg.vector_norm(weight, dim=(2, 3), keepdim=True) * 2.0**10
    whole = (weight + large) - large
    both = _padded(torch.cat([whole, weight - whole], 2), padded_group(group, bits) - group)
    if bits != 3:
        products = _key_plane(both, codes, bits)
    else:
        low = both.shape[3] // 4
        products = _key_plane(both, codes[:, :, :low], 2) + 4.0 * _key_plane(both, codes[:, :, low:], 1)
    of_whole, of_rest = products.chunk(2, 2)
    return of_whole + of_rest


def _padded(x: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, more)) if more else x


def _key_plane(weight: Tensor, codes: Tensor, width: int) -> Tensor:
    digits, count, x = 8 // width, codes.shape[2], codes.float()
    if digits == 1:
        return weight @ x
    parts = _of_shifted(digits, width, codes.device).T.contiguous() @ weight.unflatten(3, (digits, count))
    first, others = parts.flatten(3).split([count, (digits - 1) * count], 3)
    return first @ x + others @ _shifted(codes, width).flatten(2, 3)


def value_products(probability: Tensor, codes: Tensor, bits: int, group: int) -> Tensor:
    """probability . codes, a sum over tokens.

    Args:
        probability: [B, Ng, R, N].
        codes: uint8 [B, Ng, bytes, N].
        bits: of a code.
        group: channels of a group.

    Returns:
        fp32 [B, Ng, R, group].
    """
    # as in `key_products`; 255 times the sum of such probabilities stays near 2^24 steps
    large = probability.sum(-1, keepdim=True) * 2.0**8
    whole = (probability + large) - large
    both = torch.cat([whole, probability - whole], 2)
    if bits != 3:
        products = _value_plane(both, codes, bits)
    else:
        low = padded_group(group, bits) // 4
        products = _value_plane(both, codes[:, :, :low], 2) + 4.0 * _value_plane(both, codes[:, :, low:], 1)
    of_whole, of_rest = products[..., :group].chunk(2, 2)
    return of_whole + of_rest


def _value_plane(probability: Tensor, codes: Tensor, width: int) -> Tensor:
    digits, count, x = 8 // width, codes.shape[2], codes.float()
    first = probability @ x.transpose(2, 3)
    if digits == 1:
        return first
    sums = torch.cat([first, probability @ _shifted(codes, width).flatten(2, 3).transpose(2, 3)], 3)
    return (_of_shifted(digits, width, codes.device) @ sums.unflatten(3, (digits, count))).flatten(3)


def _shifted(codes: Tensor, width: int) -> Tensor:
    """g_1, g_2, ... of bytes [B, Ng, bytes, N]: fp32 [B, Ng, digits - 1, bytes, N]."""
    scales = torch.tensor([2 ** (width * i) for i in range(1, 8 // width)], device=codes.device)
    return (codes[:, :, None] * scales.to(torch.uint8)[:, None, None]).float()


def _of_shifted(digits: int, width: int, device: torch.device) -> Tensor:
    """[digits, digits]: digits from g_0, g_1, ..."""
    scales = 2.0 ** (-width * torch.arange(digits, device=device))
    one = torch.eye(digits, device=device)
    return scales[:, None] * (one - one.roll(1, 0).tril(-1)).flip(1) * scales
