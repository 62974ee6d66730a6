"""What a model calls its cache: `cache` in new versions of transformers, `past_key_values` in old ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from rotatekv_fx.errors import InputError

_NAMES = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """Name of the argument of a model's forward that takes a cache.

    Raises:
        InputError: it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in _NAMES:
        if name in parameters:
            return name
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return _NAMES[-1]
    raise InputError(
        f"{type(model).__name__}.forward takes neither {' nor '.join(_NAMES)}: it is not a decoder with a KV "
        "cache; give one, such as those of AutoModelForCausalLM."
    )


def cache_of(output: Mapping[str, Any]) -> Any:
    """The cache in what a model's forward or `generate` returned, or None where there is none."""
    return next((output[name] for name in _NAMES if output.get(name) is not None), None)
