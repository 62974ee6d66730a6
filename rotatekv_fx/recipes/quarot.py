"""Recipe `quarot`: a Hadamard rotation of each head after RoPE, as in QuaRot (arXiv 2404.00456), cache only.

QuaRot also rotates and quantizes weights and activations; here only its KV cache is built. Its clip ratio for
the cache is 0.95; at 2 bits 0.8 is used, which serves rotated channels better there.
"""

from __future__ import annotations

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.recipes.base import (
    ChannelTransform,
    LayerPlan,
    LayerShape,
    hadamard,
    quantizers,
    register,
    window_of,
)

CLIP = {2: 0.8, 3: 0.95, 4: 0.95, 8: 0.95}  # share of a group's range that the codes span, by bits


class QuaRotRecipe:
    """H per head on keys after RoPE and on values, zero-point codes per token.

    The method has no sinks: `config.sinks` is not read.
    """

    name = "quarot"
    needs_calibration = False
    needs_linear_rope = False
    default_window = 0

    def plan(
        self, shape: LayerShape, config: RotateKVConfig, statistics: LayerStatistics | None
    ) -> LayerPlan:
        """Rotations and quantizers of one layer, which depend on no statistics.

        Raises:
            ConfigError: group_size does not divide the channels.
        """
        key_quantizer, value_quantizer = quantizers(config, shape, CLIP, "zero_point")
        return LayerPlan(
            key=_rotation(shape.head_dim),
            value=_rotation(shape.value_dim),
            key_quantizer=key_quantizer,
            value_quantizer=value_quantizer,
            window=window_of(self, config),
            slack=config.slack,
        )


def _rotation(dim: int) -> ChannelTransform:
    matrix = hadamard(dim).unsqueeze(0)
    return ChannelTransform(matrix, matrix.mT)


register(QuaRotRecipe())
