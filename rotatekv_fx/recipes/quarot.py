"""Recipe `quarot`: a Hadamard rotation of each head after RoPE, as in QuaRot (arXiv 2404.00456), cache only.

QuaRot also rotates and quantizes weights and activations; here only its KV cache is built. Its clip ratio for
the cache is 0.95; at 2 bits 0.8 is used, which serves rotated channels better there.
"""

from __future__ import annotations

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig, resolve_group_size
from rotatekv_fx.recipes.base import (
    ChannelTransform,
    LayerPlan,
    LayerShape,
    Quantizer,
    hadamard,
    register,
)


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
        keys, values = shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim
        return LayerPlan(
            key=_rotation(shape.head_dim),
            value=_rotation(shape.value_dim),
            key_quantizer=_quantizer(config.key_bits, config.key_clip, config.group_size, keys),
            value_quantizer=_quantizer(config.value_bits, config.value_clip, config.group_size, values),
            window=config.window or 0,
            slack=config.slack,
        )


def _rotation(dim: int) -> ChannelTransform:
    matrix = hadamard(dim).unsqueeze(0)
    return ChannelTransform(matrix, matrix.mT)


def _quantizer(bits: int, clip: float | None, group_size: int | None, channels: int) -> Quantizer:
    default_clip = 0.8 if bits == 2 else 0.95
    return Quantizer(bits, resolve_group_size(group_size, channels), clip or default_clip, "zero_point")


register(QuaRotRecipe())
