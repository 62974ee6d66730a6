"""Recipe `paper`: RotateKV as published (arXiv 2501.16383; IJCAI 2025, doi 10.24963/ijcai.2025/690)."""

from __future__ import annotations

import torch

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig, resolve_group_size
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.recipes.base import (
    ChannelTransform,
    LayerPlan,
    LayerShape,
    Quantizer,
    hadamard,
    register,
    window_of,
)

HEAD_GROUP = 4


class PaperRecipe:
    """Grouped-head rotation before RoPE, channel reordering after it, zero-point codes, exact sinks."""

    name = "paper"
    needs_calibration = True
    needs_linear_rope = False
    default_window = 0

    def plan(
        self, shape: LayerShape, config: RotateKVConfig, statistics: LayerStatistics | None
    ) -> LayerPlan:
        """Transforms and quantizers of one layer.

        Keys: H over `head_group` neighbouring heads, then an ascending sort of the rotated channels'
        calibrated sums, so that channels of like offset share a zero point. Values: H per head.

        Raises:
            ConfigError: head_group does not divide the KV heads, or group_size not the channels.
        """
        assert statistics is not None
        heads = _head_group(config.head_group, shape.kv_heads)
        rotation = hadamard(heads * shape.head_dim).unsqueeze(0)
        rotated = ChannelTransform(rotation, rotation.mT).apply(statistics.key_sum[shape.own].flatten())
        order = torch.argsort(rotated, stable=True)
        value_rotation = hadamard(shape.value_dim).unsqueeze(0)
        return LayerPlan(
            before_rope=True,
            key=ChannelTransform(rotation, rotation.mT, order),
            value=ChannelTransform(value_rotation, value_rotation.mT),
            key_quantizer=_quantizer(
                config.key_bits, config.key_clip, config.group_size, shape.kv_heads * shape.head_dim
            ),
            value_quantizer=_quantizer(
                config.value_bits, config.value_clip, config.group_size, shape.kv_heads * shape.value_dim
            ),
            sinks=config.sinks,
            window=window_of(self, config),
            slack=config.slack,
        )


def _head_group(requested: int | None, kv_heads: int) -> int:
    if requested is None:
        return next(g for g in (HEAD_GROUP, 2, 1) if kv_heads % g == 0)
    if kv_heads % requested:
        raise ConfigError(f"head_group {requested} does not divide the {kv_heads} KV heads; use a divisor.")
    return requested


def _quantizer(bits: int, clip: float | None, group_size: int | None, channels: int) -> Quantizer:
    default_clip = 0.8 if bits == 2 else 1.0
    return Quantizer(bits, resolve_group_size(group_size, channels), clip or default_clip, "zero_point")


register(PaperRecipe())
