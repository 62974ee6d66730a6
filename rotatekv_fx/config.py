"""What the user can choose. Frozen, validated when built, with a fingerprint for caches and files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from rotatekv_fx.errors import ConfigError

SUPPORTED_BITS = (2, 3, 4, 8)
MAX_GROUP_SIZE = 128

# Settings that change what is reported or kept, never a number that the model computes.
_NOT_NUMERIC = frozenset({"allow_partial", "keep_originals", "dump_dir", "debug"})
# Name -> least value, and whether None stands for the recipe's own.
_WHOLE_NUMBERS = {
    "group_size": (1, True),
    "head_group": (1, True),
    "mean_channels": (0, False),
    "sinks": (0, False),
    "window": (0, True),
    "slack": (0, False),
    "seed": (0, False),
}
LAYER_SETTINGS = frozenset({"key_bits", "value_bits", "group_size", "key_clip", "value_clip"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateKVConfig:
    """How the KV cache is transformed and stored.

    Args:
        recipe: name of a registered recipe: "centered" (ours), "compensated" (the same, written more slowly
            and read more exactly), "paper" (RotateKV as published), "none" (exact, for comparison), or a
            baseline, "rtn" or "quarot".
        key_bits, value_bits: bits of a stored code, one of 2, 3, 4, 8.
        group_size: consecutive channels that share a scale. None takes 128, or the largest divisor of
            Hkv * head_dim up to 128; an explicit size must divide Hkv * head_dim.
        key_clip, value_clip: share of a group's range that the codes span, in (0, 1]. None takes the
            recipe's.
        head_group: KV heads rotated together, a power of two. None takes the recipe's.
        mean_channels: channels of each head whose mean a position term carries, at most (recipe "centered").
        sinks: largest |values| of a block's input that name exact tokens, per sequence; 0 turns sinks off.
        window: recent tokens that a query reads exactly. None takes the recipe's.
        slack: exact tokens kept beyond a window, so that cropping up to as many (assisted decoding) restores
            it.
        layers: settings of single layers, {layer index: {name: value}}, of the names in LAYER_SETTINGS.
        seed: of the text a model writes for its own calibration.
        allow_partial: transform the layers that match although others were rejected.
        keep_originals: keep the folded weights' originals on the CPU, so that `restore` works.
        dump_dir: folder that receives each layer's graph before and after each pass.
        debug: check every stored key and value for NaN and infinity, and name the first (slow).

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    recipe: str = "centered"
    key_bits: int = 2
    value_bits: int = 2
    group_size: int | None = None
    key_clip: float | None = None
    value_clip: float | None = None
    head_group: int | None = None
    mean_channels: int = 64
    sinks: int = 20
    window: int | None = None
    slack: int = 32
    layers: Mapping[int, Mapping[str, int | float]] = dataclasses.field(default_factory=dict, hash=False)
    seed: int = 0
    allow_partial: bool = False
    keep_originals: bool = True
    dump_dir: str | Path | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str):
            raise ConfigError(f"recipe is {self.recipe!r}; use the name of a recipe, as 'centered'.")
        for name in ("allow_partial", "keep_originals", "debug"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use True or False.")
        if self.dump_dir is not None and not isinstance(self.dump_dir, str | Path):
            raise ConfigError(f"dump_dir is {self.dump_dir!r}; use the path of a folder, or None.")
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if type(bits) is not int or bits not in SUPPORTED_BITS:
                raise ConfigError(f"{name} is {bits!r}; use one of {SUPPORTED_BITS}.")
        for name in ("key_clip", "value_clip"):
            clip = getattr(self, name)
            if clip is not None and not (isinstance(clip, int | float) and 0.0 < clip <= 1.0):
                raise ConfigError(f"{name} is {clip!r}; use a number above 0 and at most 1, or None.")
        for name, (bound, optional) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if not (optional and value is None) and (type(value) is not int or value < bound):
                raise ConfigError(f"{name} is {value!r}; use a whole number of at least {bound}.")
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers is {self.layers!r}; use a mapping from layer numbers to settings.")
        for layer, settings in self.layers.items():
            if type(layer) is not int or layer < 0:
                raise ConfigError(f"layers has the key {layer!r}; use layer numbers from 0.")
            if not isinstance(settings, Mapping) or not set(settings) <= LAYER_SETTINGS:
                raise ConfigError(
                    f"layers[{layer}] is {settings!r}; use a mapping with names of {sorted(LAYER_SETTINGS)}."
                )
            try:
                self.for_layer(layer)
            except ConfigError as error:
                raise ConfigError(f"layers[{layer}]: {error}") from None
        if self.head_group is not None and self.head_group & (self.head_group - 1):
            raise ConfigError(f"head_group is {self.head_group}; use a power of two.")

    def for_layer(self, index: int) -> RotateKVConfig:
        """The settings of one layer: these, with its own in `layers` put in.

        Raises:
            ConfigError: one of its own is out of range.
        """
        if not self.layers:
            return self
        return dataclasses.replace(self, layers={}, **self.layers.get(index, {}))

    def fingerprint(self) -> str:
        """Hash of every setting that changes a number the model computes."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_NUMERIC}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def resolve_group_size(requested: int | None, channels: int) -> int:
    """Channels that share a scale: the requested size, or the largest divisor of `channels` up to 128.

    Args:
        requested: `RotateKVConfig.group_size`.
        channels: Hkv * head_dim of the layer.

    Raises:
        ConfigError: an explicit size does not divide `channels`.
    """
    if requested is None:
        return next(g for g in range(min(MAX_GROUP_SIZE, channels), 0, -1) if channels % g == 0)
    if channels % requested:
        divisors = [g for g in range(1, min(256, channels) + 1) if channels % g == 0]
        raise ConfigError(
            f"group_size {requested} does not divide the {channels} channels of a layer's KV heads; "
            f"use one of {divisors}, or None."
        )
    return requested
