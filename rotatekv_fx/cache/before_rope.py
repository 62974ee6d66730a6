"""Keys that are stored before RoPE: how the attention reads them, and the form in which the op
`decode_before_rope` takes that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotatekv_fx.cache.keymap import TABLE_TOKENS, in_words, turned_pairs
from rotatekv_fx.cache.positions import PositionPlan
from rotatekv_fx.recipes.base import LayerPlan, LayerShape, Quantizer, hadamard
from rotatekv_fx.rope import Rope

ops = torch.ops.rotatekv
NAMES = tuple(
    f"before_rope_{name}" for name in ("order", "matrix", "mixing", "axis", "size", "angles", "table")
)
_MOST_ROWS = 64  # query rows of a unit of heads
_LEAST_DIM = 16  # a tensor-core step
_MOST_PARTS = 16  # of a head's channels
_SAME = 1e-6  # by which two angles of a pair may differ


class ReadKeys(nn.Module):
    """Stored keys as the attention reads them: in their heads' order, rotated back, turned by RoPE."""

    def __init__(self, inverse: Tensor, order: Tensor | None, rope: Rope):
        super().__init__()
        self.rope = rope
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, keys: Tensor, *positional: Tensor) -> Tensor:
        """Keys [B, Hkv, N, D], and the positional inputs of their N tokens."""
        return self.rope(ops.rotate.default(keys, self.inverse, self.order, True), *positional)


def key_map_before_rope(
    plan: LayerPlan, shape: LayerShape, rope: Rope, positions: PositionPlan, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of the key_map of `decode_before_rope` (`rotatekv_fx.ops.packed`) by name.

    Args:
        plan: what the recipe decided.
        shape: the layer's heads and channels.
        rope: the layer's RoPE.
        positions: how stored positions become its inputs.
        device: of the model.

    Returns:
        Nothing where keys are stored after RoPE, the positions are no ids, or RoPE does not turn pairs by
        fixed angles; where the rotation is not one of heads times a Walsh-Hadamard one of channels; or where
        the kernels do not take bits and sizes: 3 bits, a head or group that is no power of two, too many
        query heads, groups too small for a head.
    """
    dim, heads, transform = shape.head_dim, shape.kv_heads, plan.key
    quantizers = (plan.key_quantizer, plan.value_quantizer)
    if not plan.before_rope or transform is None or transform.inverse.shape[0] != 1 or None in quantizers:
        return {}
    block = transform.inverse.shape[-1]
    if block % dim or not all(map(in_words, quantizers)) or not _in_parts(plan.key_quantizer, dim, block):
        return {}
    if block // dim * shape.query_heads // heads > _MOST_ROWS:
        return {}
    factors = _factors(transform.inverse[0], dim)
    turned = torch.arange(dim), torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
    if rope.turned:
        turned = turned_pairs(rope, positions, device)
    if factors is None or turned is None:
        return {}
    partner, angles, size = turned
    opposite = torch.where(partner == torch.arange(dim), 0.0, angles + angles[partner])
    if opposite.abs().max() > _SAME or not torch.allclose(size, size[partner], rtol=1e-2):
        return {}
    turning = in_places(partner, (size + size[partner]) / 2, (angles - angles[partner]) / 2)
    order = torch.arange(heads * dim) if transform.order is None else torch.argsort(transform.order.cpu())
    order = order.view(heads, dim)[:, turning[0][0].long()].flatten()
    mixing, matrix = factors
    tensors = (order.int()[None], matrix.float(), mixing.float(), *turning)
    return dict(zip(NAMES, tensors, strict=True))


def in_places(partner: Tensor, size: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RoPE of a head, each channel [D] with its partner, factor and angle, as the key_map of
    `decode_before_rope` has it (`rotatekv_fx.ops.packed`): axis, size, angles, table.
    """
    places = torch.arange(len(partner))
    axis = _neighbouring(partner)
    if axis is None:
        axis, partners, turned = places, partner, angles
    else:
        partners = axis[places ^ 1]  # one that RoPE leaves alone has a neighbour too
        turned = angles[axis][::2]
    steps = torch.arange(TABLE_TOKENS, dtype=torch.float64)[:, None] * turned
    table = torch.cat([steps.cos(), steps.sin()], 1).half()
    return torch.stack([axis, partners]).int(), size[axis].float(), angles[axis], table


def _in_parts(quantizer: Quantizer, dim: int, block: int) -> bool:
    """Whether heads that are rotated together have their codes beside whole groups, each head's in a few
    parts of as many words.
    """
    group, bits = quantizer.group, quantizer.bits
    sizes = (dim, group)
    if dim < _LEAST_DIM or block % group or bits == 3 or any(x & (x - 1) for x in sizes):
        return False
    shared = max(1, group // dim)
    return 8 // bits % shared == 0 and dim * 16 // (group * bits) <= _MOST_PARTS


def _neighbouring(partner: Tensor) -> Tensor | None:
    """The channel at each place, if places differ from channels by an exchange of two bits of their numbers,
    which the Walsh-Hadamard matrix does not see, so that a channel's partner is in the place beside its own,
    place ^ 1; or None where there is no such exchange.
    """
    places = torch.arange(len(partner))
    apart = (places ^ partner)[partner != places]
    if not len(apart):
        return places
    bit = int(apart[0])
    if (apart != bit).any() or bit & (bit - 1):
        return None
    ends = (places & 1).bool() != (places & bit).bool()
    return torch.where(ends, places ^ (bit | 1), places) if bit > 1 else places


def _factors(inverse: Tensor, dim: int) -> tuple[Tensor, Tensor] | None:
    """mixing [G, G] and matrix [dim, dim] whose Kronecker product is `inverse`, the matrix a Walsh-Hadamard
    one times a power of two; or None where there are none.
    """
    count = inverse.shape[0] // dim
    blocks = inverse.cpu().reshape(count, dim, count, dim).transpose(1, 2)
    # a power of two that keeps products near what they are
    matrix = (hadamard(dim).sign() * 2.0 ** -round(dim.bit_length() / 2)).contiguous()
    mixing = ((blocks * matrix).sum((2, 3)) / matrix.square().sum()).contiguous()
    return (mixing, matrix) if torch.allclose(torch.kron(mixing, matrix), inverse.cpu()) else None
