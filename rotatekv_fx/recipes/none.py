"""Recipe `none`: the identity codec. Keys after RoPE and values are stored as they are."""

from __future__ import annotations

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.recipes.base import LayerPlan, LayerShape, register


class NoneRecipe:
    """Shows that the rewritten graphs and packed layers change nothing by themselves."""

    name = "none"
    needs_calibration = False
    needs_linear_rope = False
    default_window = 0

    def plan(
        self, shape: LayerShape, config: RotateKVConfig, statistics: LayerStatistics | None
    ) -> LayerPlan:
        return LayerPlan()


register(NoneRecipe())
