"""Saving a transformed model: its original weights, and how to transform them again.

`save_pretrained` of a transformed model writes the weights as they were before rotations were merged into
them, the settings to `config.json` and the calibration beside it. Whoever loads the folder gets a model that
is right: transformed again where `rotatekv_fx` is imported (`loading.py`), the untransformed one elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rotatekv_fx.binding import MARK, Original
from rotatekv_fx.calibration import Calibration
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.errors import ConfigError, StateError

METHOD = "rotatekv"  # "quant_method" of config.json; transformers warns where it does not know one
CALIBRATION_FILE = "rotatekv_calibration.safetensors"
_ENTRY = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that transforms a model again.

    Attributes:
        settings: of transform().
        calibration: what it used, None where the recipe needs none.
        fingerprint: of the untransformed model.
    """

    settings: RotateKVConfig
    calibration: Calibration | None
    fingerprint: str

    def as_entry(self) -> dict[str, Any]:
        """What `config.json` holds."""
        settings = dataclasses.asdict(self.settings)
        del settings["dump_dir"]
        settings["layers"] = {str(layer): dict(values) for layer, values in self.settings.layers.items()}
        file = CALIBRATION_FILE if self.calibration is not None else None
        return {
            "quant_method": METHOD,
            "settings": settings,
            "calibration": file,
            "fingerprint": self.fingerprint,
        }


def settings_of(entry: Mapping[str, Any]) -> RotateKVConfig:
    """The settings that `Recipe.as_entry` wrote.

    Raises:
        ConfigError: they are damaged, or of a version with other settings.
    """
    try:
        fields = dict(entry["settings"])
        fields["layers"] = {int(layer): values for layer, values in fields["layers"].items()}
        return RotateKVConfig(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the {METHOD} settings in config.json cannot be used: {error}; save the transformed model again."
        ) from error


def save(
    model: Any, recipe: Recipe, originals: tuple[Original, ...], folder: str | Path, **options: Any
) -> None:
    """Save a transformed model; `from_pretrained` transforms it again.

    Args:
        model: the transformed model.
        recipe: what transform() did.
        originals: the weights before that.
        folder: receives the model.
        options: of `save_pretrained`.

    Raises:
        StateError: the original weights were not kept, are quantized, are spread over several processes or
            were converted to another dtype, or `push_to_hub` is among the options.
    """
    if any(o.parameters is None for o in originals):
        raise StateError(
            "the original weights were not kept (keep_originals=False), and saved weights would be rotated; "
            "load the model again and save that."
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_tp_size", None) is not None:
        raise StateError(
            "a transformed model with quantized weights or tensor parallelism cannot be saved; save the "
            "model before transform(), and its calibration beside it."
        )
    for original in originals:
        for name, before in (original.parameters or {}).items():
            now = model.get_submodule(original.name).get_parameter(name)
            if now.dtype is not before.dtype:
                raise StateError(
                    f"the model was transformed in {before.dtype} and is now {now.dtype}; restore(model), "
                    "convert it, and transform it again before it is saved."
                )
    if options.get("push_to_hub"):
        raise StateError(
            "save_pretrained(push_to_hub=True) leaves out the calibration; use model.push_to_hub()."
        )
    weights = original_weights(model.state_dict() | (options.pop("state_dict", None) or {}), originals)
    if recipe.calibration is not None and options.get("is_main_process", True):
        Path(folder).mkdir(parents=True, exist_ok=True)
        recipe.calibration.save(Path(folder) / CALIBRATION_FILE)
    with _entry_in(model.config, recipe.as_entry()):
        type(model).save_pretrained(model, folder, state_dict=weights, **options)


def original_weights(state_dict: Mapping[str, Tensor], originals: tuple[Original, ...]) -> dict[str, Tensor]:
    """A transformed model's state_dict as it was before transform()."""
    before = {f"{o.name}.{n}": t for o in originals for n, t in (o.parameters or {}).items()}
    return {n: before.get(n, t) for n, t in state_dict.items() if not n.endswith(f".{MARK}")}


@contextlib.contextmanager
def _entry_in(config: Any, entry: dict[str, Any]) -> Iterator[None]:
    before = vars(config).get(_ENTRY)
    setattr(config, _ENTRY, entry)
    try:
        yield
    finally:
        delattr(config, _ENTRY)
        if before is not None:
            setattr(config, _ENTRY, before)
