"""How keys after RoPE become codes, in the form that the ops `decode` and `extend` take it.

The mean that a recipe removes before RoPE is, after it, a sum over pairs of channels of cos(p t) and
sin(p t), p the position and t the pair's angle. The angles are read off the model's RoPE by asking it for
powers of two, and checked at other positions: where they do not describe it, keys are read the general way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotatekv_fx.cache.positions import PositionPlan
from rotatekv_fx.recipes.base import ChannelTransform, LayerPlan, LayerShape, Quantizer
from rotatekv_fx.rope import Rope

NAMES = tuple(f"key_map_{part}" for part in ("matrix", "mean", "rotation", "angles", "table", "reach"))
TABLE_TOKENS = 64  # the longest tile of the kernels
_LEAST_PAIRS = 16  # a tensor-core step
_LEAST_DIM = 16  # the same, of a head's channels
_MOST_ROWS = 32  # query rows of a unit of heads
_LIMITS = (1 << 17, 1 << 12, 1 << 9)  # positions asked for; a table may hold fewer
# Of a cosine: bfloat16 rounds it to 0.004, and fp32 the angles of distant tokens to 0.008, here and in the
# estimate.
_TOLERANCE = 0.05


def key_map(
    plan: LayerPlan,
    shape: LayerShape,
    rope: Rope,
    positions: PositionPlan,
    device: torch.device,
) -> dict[str, Tensor]:
    """The tensors of `rotatekv_fx.ops.packed`'s key_map by name.

    Args:
        plan: what the recipe decided; keys are stored after RoPE, and keys and values quantized.
        shape: the layer's heads and channels.
        rope: the layer's RoPE.
        positions: how stored positions become its inputs.
        device: of the model.

    Returns:
        Nothing where the positions are no ids, RoPE does not turn pairs by fixed angles, or the heads and
        groups are of sizes that the kernels do not take.
    """
    dim, heads = shape.head_dim, shape.kv_heads
    if plan.key_quantizer is None or plan.value_quantizer is None:
        return {}
    if plan.key_feedback is not None or plan.value_feedback is not None:  # the ops don't compensate
        return {}
    turned = torch.arange(dim), torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
    if plan.center is not None and rope.turned:
        turned = turned_pairs(rope, positions, device)
    if turned is None:
        return {}
    partner, angles, size = turned
    transform = plan.key or ChannelTransform(*[torch.eye(dim, dtype=torch.float64)[None]] * 2)
    block = transform.matrix.shape[-1]
    unit = math.lcm(
        block // dim,
        plan.key_quantizer.group // math.gcd(plan.key_quantizer.group, dim),
        plan.value_quantizer.group // math.gcd(plan.value_quantizer.group, shape.value_dim),
    )
    quantizers = (plan.key_quantizer, plan.value_quantizer)
    rows = unit * shape.query_heads // heads
    if heads % unit or rows > _MOST_ROWS or dim < _LEAST_DIM or not all(map(in_words, quantizers)):
        return {}
    matrix, inverse = (_of_units(m, heads * dim // block, unit * dim // block) for m in
                       (transform.matrix, transform.inverse))  # fmt: skip
    mean = torch.zeros(heads, dim, dtype=torch.float64) if plan.center is None else plan.center.cpu()
    kept = [c for c in range(dim) if c <= int(partner[c]) and bool(mean[:, [c, int(partner[c])]].abs().any())]
    pairs = max(_LEAST_PAIRS, 1 << max(0, len(kept) - 1).bit_length()) if kept else 0
    by_cos, by_sin = (torch.zeros(heads, pairs, dim, dtype=torch.float64) for _ in range(2))
    pair_angles = torch.zeros(pairs, dtype=torch.float64)
    for i, c in enumerate(kept):
        other = int(partner[c])
        pair_angles[i] = angles[c]
        by_cos[:, i, c], by_cos[:, i, other] = size[c] * mean[:, c], size[c] * mean[:, other]
        if other != c:
            by_sin[:, i, c], by_sin[:, i, other] = size[c] * mean[:, other], -size[c] * mean[:, c]
    channels = unit * dim
    spread = torch.zeros(heads // unit, 2 * pairs, channels, dtype=torch.float64)
    rotation = torch.zeros(heads, dim, channels + 2 * pairs, dtype=torch.float64)
    for head in range(heads):
        place = slice(head % unit * dim, (head % unit + 1) * dim)
        waves = torch.cat([by_cos[head], by_sin[head]])
        spread[head // unit, :, place] = waves
        rotation[head] = torch.cat([inverse[head // unit][:, place].T, waves.T], 1)
    steps = torch.arange(TABLE_TOKENS, dtype=torch.float64)[:, None] * pair_angles
    tensors = (
        matrix.float(),
        (spread @ matrix).float(),
        rotation.float(),
        pair_angles,
        torch.cat([steps.cos(), steps.sin()], 1).half(),
        reach_of(rotation, channels),
    )
    return dict(zip(NAMES, tensors, strict=True))


def reach_of(rotation: Tensor, channels: int) -> Tensor:
    """Of each head's rotation [Hkv, D, C + 2P], the longest of its first `channels` columns: fp32 [Hkv], a
    little more, for rounding.
    """
    return 1.0001 * rotation[..., :channels].norm(dim=1).amax(-1).float()


def in_words(quantizer: Quantizer) -> bool:
    """Whether kernels can read a group's codes as 16-bit words."""
    group = quantizer.group
    return group % 16 == 0 and (quantizer.bits != 3 or group & (group - 1) == 0)


def _of_units(blocks: Tensor, count: int, per_unit: int) -> Tensor:
    """[n or 1, m, m] blocks on the diagonals of [units, C, C]."""
    blocks = blocks.cpu().expand(count, -1, -1)
    return torch.stack([torch.block_diag(*group) for group in blocks.split(per_unit)])


def turned_pairs(
    rope: Rope, positions: PositionPlan, device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Each channel's partner [D], angle t and factor f, float64 [D]: at position p, a = f cos(p t) and
    b = f sin(p t) of `Rope.coefficients`. Partners show at distant positions: the slowest pairs turn by 1e-6
    a token.
    """
    if positions.description != "ids" or len(positions.inputs) != 1:
        return None
    if device.type == "cuda" and any(one.rotary is None for one in positions.stored):
        return None  # ids may index a table, and a GPU does not survive one past its end
    for limit in _LIMITS:
        powers = torch.tensor([0, *(1 << i for i in range(limit.bit_length() - 1))])
        others = torch.randint(limit, (64,), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([powers, others])
        try:
            rows = positions.decode((ids.int().view(1, 1, -1, 1).to(device),))
            partner, _ = rope.partners(rows)
            a, b = (t[0].cpu() for t in rope.coefficients(partner, rows, len(ids)))
        except (IndexError, RuntimeError):  # positions that a table does not hold
            continue
        size, angles = a[0].abs().clamp(min=1e-30), torch.atan2(b[1], a[1])
        for row, position in enumerate(powers[2:].tolist(), 2):
            off = torch.atan2(b[row], a[row]) - position * angles
            angles = angles + (off - (off / (2 * math.pi)).round() * 2 * math.pi) / position
        angles = torch.where(partner == torch.arange(rope.dim), 0.0, angles)
        turns = others.double()[:, None] * angles
        error = torch.stack([a[len(powers) :] - size * turns.cos(), b[len(powers) :] - size * turns.sin()])
        return (partner, angles, size) if bool((error.abs().amax((0, 1)) < _TOLERANCE * size).all()) else None
    return None
