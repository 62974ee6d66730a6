"""Recipe `rtn`: round-to-nearest per token, the plainest baseline. Nothing is rotated, centered or kept."""

from __future__ import annotations

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import SUPPORTED_BITS, RotateKVConfig
from rotatekv_fx.recipes.base import LayerPlan, LayerShape, quantizers, register, window_of

CLIP = dict.fromkeys(SUPPORTED_BITS, 1.0)  # share of a group's range that the codes span, by bits


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
        key_quantizer, value_quantizer = quantizers(config, shape, CLIP, "midpoint")
        return LayerPlan(
            key_quantizer=key_quantizer,
            value_quantizer=value_quantizer,
            window=window_of(self, config),
            slack=config.slack,
        )


register(RoundToNearestRecipe())
