"""rotatekv_fx: a packed 2-bit KV cache for Hugging Face decoders, inserted by graph passes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotatekv_fx import recipes
    from rotatekv_fx.api import calibrate, inspect_model, report, restore, transform
    from rotatekv_fx.cache import cache_nbytes
    from rotatekv_fx.calibration import Calibration
    from rotatekv_fx.config import RotateKVConfig
    from rotatekv_fx.errors import RotateKVError
    from rotatekv_fx.export.onnx import export_onnx
    from rotatekv_fx.report import Report

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Report",
    "RotateKVConfig",
    "RotateKVError",
    "cache_nbytes",
    "calibrate",
    "export_onnx",
    "inspect_model",
    "recipes",
    "report",
    "restore",
    "transform",
]

_HOMES = {
    **dict.fromkeys(("calibrate", "inspect_model", "report", "restore", "transform"), "api"),
    "Calibration": "calibration",
    "Report": "report",
    "RotateKVConfig": "config",
    "RotateKVError": "errors",
    "cache_nbytes": "cache",
    "export_onnx": "export.onnx",
}


class _Package(ModuleType):
    """Imports the home of a public name when it is first read: `export.generation` runs without torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name not in _HOMES:
            return importlib.import_module(f"{self.__name__}.{name}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system sets submodules here; `report`, for one, is a function of ours
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

try:
    from rotatekv_fx import loading as _loading  # noqa: F401 (from_pretrained of transformed models)
except ImportError as error:  # a machine that only runs exported graphs may lack or have older packages
    if (error.name or "").startswith(__name__):
        raise
