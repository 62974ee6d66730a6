"""Recipe `paper`: RotateKV as published (arXiv 2501.16383; IJCAI 2025, doi 10.24963/ijcai.2025/690)."""

from __future__ import annotations

import torch

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.recipes.base import (
    ChannelTransform,
    LayerPlan,
    LayerShape,
    hadamard,
    quantizers,
    register,
    rotated_heads,
    window_of,
)

HEAD_GROUP = 4
CLIP = {2: 0.8, 3: 1.0, 4: 1.0, 8: 1.0}  # share of a group's range that the codes span, by bits


class PaperRecipe:
    """Grouped-head rotation before RoPE, then channels reordered; zero-point codes, exact sinks."""

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
        heads = rotated_heads(config.head_group, HEAD_GROUP, shape.kv_heads)
        rotation = hadamard(heads * shape.head_dim).unsqueeze(0)
        rotated = ChannelTransform(rotation, rotation.mT).apply(statistics.key_sum[shape.own].flatten())
        order = torch.argsort(rotated, stable=True)
        value_rotation = hadamard(shape.value_dim).unsqueeze(0)
        key_quantizer, value_quantizer = quantizers(config, shape, CLIP, "zero_point")
        return LayerPlan(
            before_rope=True,
            key=ChannelTransform(rotation, rotation.mT, order),
            value=ChannelTransform(value_rotation, value_rotation.mT),
            key_quantizer=key_quantizer,
            value_quantizer=value_quantizer,
            sinks=config.sinks,
            window=window_of(self, config),
            slack=config.slack,
        )


register(PaperRecipe())
