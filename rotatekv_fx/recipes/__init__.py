"""Recipes: calibration statistics -> transforms of K and V. A new recipe is one file."""

from rotatekv_fx.recipes import centered, compensated, none, paper, quarot, rtn
from rotatekv_fx.recipes.base import (
    ChannelTransform,
    LayerPlan,
    LayerShape,
    Quantizer,
    Recipe,
    get,
    names,
    plan_layer,
    register,
    window_of,
)

__all__ = [
    "ChannelTransform",
    "LayerPlan",
    "LayerShape",
    "Quantizer",
    "Recipe",
    "centered",
    "compensated",
    "get",
    "names",
    "none",
    "paper",
    "plan_layer",
    "quarot",
    "register",
    "rtn",
    "window_of",
]
