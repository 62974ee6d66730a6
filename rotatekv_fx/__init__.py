"""rotatekv_fx: a packed 2-bit KV cache for Hugging Face decoders, inserted by graph passes."""

from rotatekv_fx import loading as _loading  # noqa: F401 (from_pretrained of transformed models)
from rotatekv_fx import recipes
from rotatekv_fx.api import calibrate, inspect_model, report, restore, transform
from rotatekv_fx.cache import cache_nbytes
from rotatekv_fx.calibration import Calibration
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.errors import RotateKVError
from rotatekv_fx.report import Report

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Report",
    "RotateKVConfig",
    "RotateKVError",
    "cache_nbytes",
    "calibrate",
    "inspect_model",
    "recipes",
    "report",
    "restore",
    "transform",
]
