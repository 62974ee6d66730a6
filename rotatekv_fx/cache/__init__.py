"""The packed KV cache: layers that replace transformers' own in place."""

from rotatekv_fx.cache.before_rope import ReadKeys, key_map_before_rope
from rotatekv_fx.cache.keymap import key_map
from rotatekv_fx.cache.layers import LayerSpec, PackedLayer
from rotatekv_fx.cache.positions import PositionPlan, plan_positions
from rotatekv_fx.cache.runtime import AttentionRuntime, cache_nbytes

__all__ = [
    "AttentionRuntime",
    "LayerSpec",
    "PackedLayer",
    "PositionPlan",
    "ReadKeys",
    "cache_nbytes",
    "key_map",
    "key_map_before_rope",
    "plan_positions",
]
