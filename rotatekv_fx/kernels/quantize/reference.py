"""Packing, the two quantizers, and writes into packed token slots, in plain torch.

The byte layout is described where the op `quantize` is declared (`rotatekv_fx.ops`). Packing multiplies and
adds, and unpacking shifts int32: uint8 shifts do not survive an ONNX export.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEMES = ("zero_point", "midpoint")

_SCALE_MIN = 2.0**-14  # smallest normal fp16
_HALF_MAX = 65504.0  # largest finite fp16
_ZERO_MAX = 32767  # largest int16
_PLANE_MULTIPLE = {2: 4, 3: 8, 4: 2, 8: 1}


def padded_group(group: int, bits: int) -> int:
    """Channels of a group once padded so that its planes fill whole bytes."""
    multiple = _PLANE_MULTIPLE[bits]
    return -(-group // multiple) * multiple


def packed_bytes(group: int, bits: int) -> int:
    """Bytes that hold the codes of one group of one token.

    Args:
        group: channels of a group, before padding.
        bits: 2, 3, 4 or 8.
    """
    return padded_group(group, bits) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, int32 [..., group] in 0 to 2^bits - 1, as bytes, uint8 [..., packed_bytes(group, bits)]."""
    group = codes.shape[-1]
    if padded_group(group, bits) > group:
        codes = F.pad(codes, (0, padded_group(group, bits) - group))
    if bits == 3:
        return torch.cat([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], dim=-1)
    return _pack_plane(codes, bits)


def unpack(packed: Tensor, bits: int, group: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., packed_bytes(group, bits)] to int32 [..., group]."""
    packed = packed.to(torch.int32)
    if bits == 3:
        low_bytes = padded_group(group, bits) // 4
        codes = _unpack_plane(packed[..., :low_bytes], 2) + 4 * _unpack_plane(packed[..., low_bytes:], 1)
    else:
        codes = _unpack_plane(packed, bits)
    return codes[..., :group]


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    places = 2 ** (width * torch.arange(8 // width, dtype=torch.int32, device=codes.device))
    digits = codes.unflatten(-1, (8 // width, -1))
    return (digits * places[:, None]).sum(-2, dtype=torch.int32).to(torch.uint8)


def _unpack_plane(packed: Tensor, width: int) -> Tensor:
    return torch.cat([(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)], dim=-1)


def quantize(
    x: Tensor, bits: int, group: int, clip: float, scheme: str, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of the op `rotatekv::quantize` (`rotatekv_fx.ops` describes it)."""
    batch, heads, tokens, dim = x.shape
    values = x.float()
    if dim != group:
        values = values.transpose(1, 2).reshape(batch, tokens, heads * dim // group, group).transpose(1, 2)
    high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
    mid, top = (high + low) / 2, 2**bits - 1
    flat = ~(high > low)  # all values equal, or one is NaN
    if scheme == "midpoint":
        scale, offset = midpoint_grid(high, low, bits, clip)
        codes = torch.round((values - offset.float()) / scale)
    else:
        xmax, xmin = clip * high, clip * low
        scale = _half_scale((xmax - xmin) / top)
        zero = torch.round(-xmin / scale)
        flat = flat | ~(zero.abs() <= _ZERO_MAX)
        scale = torch.where(flat, _half_scale(mid.abs()), scale)
        sign = (mid > 0.5 * scale).float() - (mid < -0.5 * scale).float()
        zero = torch.where(flat, -sign, zero)
        offset = zero.to(torch.int16)
        codes = torch.round(values / scale) + zero
    codes = codes.clamp(0, top).masked_fill(flat, 0.0).to(torch.int32)
    if order is not None:
        codes = _rearranged(codes, order)
    return (
        pack(codes, bits).contiguous(),
        scale.squeeze(-1).to(torch.float16).contiguous(),
        offset.squeeze(-1).contiguous(),
    )


def _rearranged(codes: Tensor, order: Tensor, back: bool = False) -> Tensor:
    """Codes [B, Ng, S, group], of which each place gets the one of the channel that `order` [C] names; or
    back again.
    """
    flat = codes.transpose(1, 2).flatten(2)
    flat = torch.empty_like(flat).index_copy_(2, order, flat) if back else flat[..., order]
    return flat.unflatten(2, (codes.shape[1], -1)).transpose(1, 2)


def midpoint_grid(high: Tensor, low: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """Scale (fp32, a normal fp16 number) and lo (fp16) of groups with these largest and least values."""
    reach = clip * (high - low) / 2
    offset = ((high + low) / 2 - reach).clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)
    return _half_scale(2.0 * reach / (2**bits - 1)), offset


def _half_scale(scale: Tensor) -> Tensor:
    """The scale as it is stored: a normal fp16 number, held in fp32."""
    return scale.clamp(_SCALE_MIN, _HALF_MAX).to(torch.float16).float()


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group: int,
    heads: int,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> Tensor:
    """Reference of the op `rotatekv::dequantize` (`rotatekv_fx.ops` describes it)."""
    batch, groups, tokens, _ = codes.shape
    levels = unpack(codes, bits, group)
    levels = (levels if order is None else _rearranged(levels, order, back=True)).float()
    step, start = scale.float()[..., None], offset.float()[..., None]
    values = step * (levels - start) if offset.dtype == torch.int16 else start + step * levels
    by_token = values.transpose(1, 2).reshape(batch, tokens, heads, groups * group // heads)
    return by_token.transpose(1, 2).to(dtype).contiguous()


def append(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    x: Tensor,
    slots: Tensor,
    bits: int,
    group: int,
    clip: float,
    scheme: str,
    order: Tensor | None = None,
) -> None:
    """Reference of the op `rotatekv::append` (`rotatekv_fx.ops` describes it)."""
    parts = quantize(x, bits, group, clip, scheme, order)
    for buffer, new in zip((codes, scale, offset), parts, strict=True):
        buffer.index_copy_(2, slots, new)


def store(buffer: Tensor, x: Tensor, slots: Tensor) -> None:
    """Reference of the op `rotatekv::store` (`rotatekv_fx.ops` describes it)."""
    buffer.index_copy_(2, slots, x.to(buffer.dtype))
