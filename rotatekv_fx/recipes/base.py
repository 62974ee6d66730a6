"""What a recipe decides for one layer, and the registry of recipes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig, resolve_group_size
from rotatekv_fx.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ChannelTransform:
    """A linear map of one token's channels, all heads concatenated: y = (x @ matrix)[order].

    Attributes:
        matrix: float64 [N, M, M], or [1, M, M] shared by all blocks of M channels.
        inverse: float64, its inverse.
        order: int64 [H*D], the channels' order after the matrix, or None.
    """

    matrix: Tensor
    inverse: Tensor
    order: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Transform float64 [..., H*D] channels."""
        blocks = x.unflatten(-1, (-1, self.matrix.shape[-1]))
        matrices = self.matrix.expand(blocks.shape[-2], -1, -1)
        y = torch.einsum("...nc,ncd->...nd", blocks, matrices).flatten(-2)
        return y if self.order is None else y[..., self.order]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How channels become codes: `group` consecutive channels share a scale and an offset."""

    bits: int
    group: int
    clip: float
    scheme: str

    @property
    def bits_per_element(self) -> float:
        """Bits of a code, plus its share of a 16-bit scale and a 16-bit offset."""
        return self.bits + 32 / self.group


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What is done to one layer's keys and values.

    Attributes:
        before_rope: keys are stored as they were before RoPE, which is applied to them when they are read.
        center: float64 [Hkv, D], removed from keys before RoPE and added back when they are read, or None.
        key, value: channel transforms, or None for none.
        key_feedback, value_feedback: float64 [n, m, m] of the op `compensate`, which then precedes the
            quantizer, or None.
        key_quantizer, value_quantizer: None stores exact values in the model's own dtype.
        sinks: largest |values| of the block's input that name exact tokens.
        window: recent tokens that a query reads exactly.
        slack: exact tokens kept beyond the window.
    """

    before_rope: bool = False
    center: Tensor | None = None
    key: ChannelTransform | None = None
    value: ChannelTransform | None = None
    key_feedback: Tensor | None = None
    value_feedback: Tensor | None = None
    key_quantizer: Quantizer | None = None
    value_quantizer: Quantizer | None = None
    sinks: int = 0
    window: int = 0
    slack: int = 0


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Heads and channels of one layer's cache, in this process.

    `first_head` is the number of its first KV head among all that the layer's statistics are of: 0, unless
    tensor parallelism spreads the heads over processes.
    """

    layer_index: int
    kv_heads: int
    query_heads: int
    head_dim: int
    value_dim: int
    first_head: int = 0

    @property
    def own(self) -> slice:
        """This process's KV heads."""
        return slice(self.first_head, self.first_head + self.kv_heads)


class Recipe(Protocol):
    """A way to turn calibration statistics into transforms of K and V."""

    name: str
    needs_calibration: bool
    needs_linear_rope: bool
    default_window: int

    def plan(
        self, shape: LayerShape, config: RotateKVConfig, statistics: LayerStatistics | None
    ) -> LayerPlan: ...


def window_of(recipe: Recipe, config: RotateKVConfig) -> int:
    """Recent tokens kept exact: the config's, or the recipe's own number."""
    return recipe.default_window if config.window is None else config.window


def rotated_heads(requested: int | None, most: int, kv_heads: int) -> int:
    """KV heads rotated together: as many as requested, or the largest power of two up to `most`.

    Args:
        requested: `RotateKVConfig.head_group`.
        most: the recipe's own number, a power of two; less where it does not divide Hkv.
        kv_heads: Hkv.

    Raises:
        ConfigError: the requested number does not divide Hkv.
    """
    if requested is None:
        return math.gcd(most, kv_heads)
    if kv_heads % requested:
        raise ConfigError(f"head_group {requested} does not divide the {kv_heads} KV heads; use a divisor.")
    return requested


def quantizers(
    config: RotateKVConfig, shape: LayerShape, clips: Mapping[int, float], scheme: str
) -> tuple[Quantizer, Quantizer]:
    """Quantizers of one layer's keys and values.

    Args:
        clips: the recipe's own clip, by bits, where the config has none.
        scheme: "midpoint" or "zero_point".

    Raises:
        ConfigError: group_size does not divide the channels of all heads.
    """
    keys, values = shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim
    sides = (
        (config.key_bits, config.key_clip, keys),
        (config.value_bits, config.value_clip, values),
    )
    key, value = (
        Quantizer(bits, resolve_group_size(config.group_size, channels), clip or clips[bits], scheme)
        for bits, clip, channels in sides
    )
    return key, value


_REGISTRY: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Make a recipe available by its name."""
    _REGISTRY[recipe.name] = recipe
    return recipe


def names() -> tuple[str, ...]:
    """Names of the registered recipes."""
    return tuple(sorted(_REGISTRY))


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"recipe {name!r} is unknown; use one of {', '.join(names())}.")
    return _REGISTRY[name]


def plan_layer(config: RotateKVConfig, shape: LayerShape, statistics: LayerStatistics | None) -> LayerPlan:
    """What a config's recipe decides for a layer, of which the config may have settings of its own.

    Raises:
        ConfigError: the recipe is unknown, or a setting does not fit the layer; the message names it.
    """
    recipe = get(config.recipe)
    try:
        return recipe.plan(shape, config.for_layer(shape.layer_index), statistics)
    except ConfigError as error:
        raise ConfigError(f"layer {shape.layer_index}: {error}") from None


def hadamard(size: int) -> Tensor:
    """Sylvester's Walsh-Hadamard matrix / sqrt(size), float64; for 2^a * c, c blocks of the one of 2^a."""
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return torch.block_diag(*[matrix / power**0.5] * (size // power))
