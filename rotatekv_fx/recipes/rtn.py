"""Recipe `rtn`: round-to-nearest per token, the plainest baseline. Nothing is rotated, centered or kept."""

from __future__ import annotations

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig, resolve_group_size
from rotatekv_fx.recipes.base import LayerPlan, LayerShape, Quantizer, register


class RoundToNearestRecipe:
    """Keys after RoPE and values as they are, codes from the least to the largest of each group.

    The method has no sinks: `config.sinks` is not read.
    """

    name = "rtn"
    needs_calibration = False
    needs_linear_rope = False
    default_window = 0

    def plan(
        self, shape: LayerShape, config: RotateKVConfig, statistics: LayerStatistics | None
    ) -> LayerPlan:
        """Quantizers of one layer, which depend on no statistics.

        Raises:
            ConfigError: group_size does not divide the channels.
        """
        keys, values = shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim
        return LayerPlan(
            key_quantizer=_quantizer(config.key_bits, config.key_clip, config.group_size, keys),
            value_quantizer=_quantizer(config.value_bits, config.value_clip, config.group_size, values),
            window=config.window or 0,
            slack=config.slack,
        )


def _quantizer(bits: int, clip: float | None, group_size: int | None, channels: int) -> Quantizer:
    return Quantizer(bits, resolve_group_size(group_size, channels), clip or 1.0, "midpoint")


register(RoundToNearestRecipe())
