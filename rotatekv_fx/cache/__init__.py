"""The packed KV cache: layers that replace transformers' own in place."""

from rotatekv_fx.cache.keymap import key_map
from rotatekv_fx.cache.layers import LayerSpec, PackedLayer
from rotatekv_fx.cache.positions import PositionPlan, plan_positions
from rotatekv_fx.cache.runtime import AttentionRuntime, cache_nbytes

__all__ = [
    "AttentionRuntime",
    "LayerSpec",
    "PackedLayer",
    "PositionPlan",
    "cache_nbytes",
    "key_map",
    "plan_positions",
]
