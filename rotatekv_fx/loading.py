"""`from_pretrained` of a folder that a transformed model was saved to: transforms it again.

To transformers the saved settings are a quantization of the method "rotatekv", registered by importing this
package; what loads the weights is transformers itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from rotatekv_fx.api import transform
from rotatekv_fx.calibration import Calibration, model_fingerprint
from rotatekv_fx.errors import CalibrationError
from rotatekv_fx.saving import METHOD, settings_of


@register_quantization_config(METHOD)
class SavedTransform(QuantizationConfigMixin):
    """The entry of `config.json`."""

    def __init__(
        self,
        quant_method: str = METHOD,
        settings: dict[str, Any] | None = None,
        calibration: str | None = None,
        fingerprint: str = "",
    ):
        self.quant_method = quant_method
        self.settings, self.calibration, self.fingerprint = settings, calibration, fingerprint


@register_quantizer(METHOD)
class TransformAgain(HfQuantizer):
    """Changes nothing while the weights are loaded, and transforms the model afterwards."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Transform the loaded model.

        Raises:
            ConfigError: the settings cannot be used.
            CalibrationError: the weights are not those that were saved, or the calibration cannot be read.
        """
        entry = self.quantization_config
        _forget_quantization(model)
        found = model_fingerprint(model)
        if found != entry.fingerprint:
            raise CalibrationError(
                "the weights have changed since the transformed model was saved (fingerprint "
                f"{entry.fingerprint}, now {found}); delete quantization_config from config.json, load, "
                "calibrate and transform again."
            )
        settings = settings_of({"settings": entry.settings})
        calibration = None if entry.calibration is None else _calibration(model, entry.calibration)
        return transform(model, settings, calibration)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Never asked: the loaded model holds no quantizer."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _forget_quantization(model: Any) -> None:
    """To transformers the model is an ordinary one from here on."""
    vars(model).pop("hf_quantizer", None)
    vars(model).pop("quantization_method", None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = False


def _calibration(model: Any, file: str) -> Calibration:
    location, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    try:
        path = cached_file(location, file, revision=revision)
    except OSError as error:
        raise CalibrationError(
            f"{location} holds no {file}, which its config.json names; save the model again: {error}"
        ) from error
    return Calibration.load(path)
