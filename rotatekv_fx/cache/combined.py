"""Packed twins of cache layers that hold a state-space model's states beside keys and values.

The states stay what they are: the twin takes them over from the layer that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from rotatekv_fx.cache.kinds import (
    PackedDynamicLayer,
    PackedSlidingLayer,
    PackedStaticLayer,
    PackedStaticSlidingLayer,
)
from rotatekv_fx.cache.layers import LayerSpec, PackedLayer


class _States:
    """Goes before a packed layer and `LinearAttentionLayer`: what both have a part in."""

    # a recurrent state cannot be taken back
    is_croppable = False
    supports_early_init = False

    def __init__(self, replaced: Any, spec: LayerSpec, owner: PackedLayer | None):
        super().__init__(replaced, spec, owner)
        vars(self).update({name: v for name, v in vars(replaced).items() if name not in vars(self)})

    def lazy_initialization(self, *tensors: Tensor, **states: Any) -> None:
        """Keys and values come as they are, states by name."""
        if states:
            LinearAttentionLayer.lazy_initialization(self, **states)
        else:
            super().lazy_initialization(*tensors)

    def _change_batch(self, batch: int, function: Callable[[Tensor], Tensor]) -> None:
        super()._change_batch(batch, function)
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: function(t) for i, t in states.items() if t is not None})

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers does it: an error where states are not recorded."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        LinearAttentionLayer.reset(self)
        super().reset()


class PackedDynamicWithStates(_States, PackedDynamicLayer, LinearAttentionLayer):
    """Grows with every token."""


class PackedSlidingWithStates(_States, PackedSlidingLayer, LinearAttentionLayer):
    """Keeps the last sliding_window tokens."""


class PackedStaticWithStates(_States, PackedStaticLayer, LinearAttentionLayer):
    """Fixed buffers, written in place."""


class PackedStaticSlidingWithStates(_States, PackedStaticSlidingLayer, LinearAttentionLayer):
    """Fixed buffers for the last sliding_window tokens."""


# The first is older than the others.
_NAMES = {
    "LinearAttentionAndFullAttentionLayer": PackedDynamicWithStates,
    "LinearAttentionAndSlidingWindowAttentionLayer": PackedSlidingWithStates,
    "LinearAttentionAndStaticFullAttentionLayer": PackedStaticWithStates,
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": PackedStaticSlidingWithStates,
}
COMBINED: dict[type, type[PackedLayer]] = {
    getattr(cache_utils, name): twin for name, twin in _NAMES.items() if hasattr(cache_utils, name)
}
