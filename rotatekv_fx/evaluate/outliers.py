"""Outlier channels of keys, before and after each step of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotatekv_fx import Calibration, RotateKVConfig, recipes
from rotatekv_fx.api import attention_sites
from rotatekv_fx.collect import SINK_TOKENS, observed
from rotatekv_fx.recipes import LayerPlan, LayerShape
from rotatekv_fx.rope import Rope
from rotatekv_fx.sites import AttentionSite


class _Energy:
    """Sums of squares of one layer's key channels, at each step of its plan."""

    def __init__(self, site: AttentionSite, plan: LayerPlan):
        self.plan, self.rope = plan, Rope(site)
        self.sums: dict[str, Tensor] = {}

    def add(
        self,
        key: Tensor,
        key_post: Tensor,
        value: Tensor,
        query: Tensor | None,
        positional: tuple[Tensor, ...],
    ) -> None:
        """Add one window; what a calibration receives (`rotatekv_fx.collect`)."""
        for step, x in self._steps(key.double(), key_post.double(), positional):
            sums = x[:, :, SINK_TOKENS:].square().sum((0, 2)).cpu()
            self.sums[step] = self.sums.get(step, 0) + sums

    def _steps(
        self, key: Tensor, key_post: Tensor, positional: tuple[Tensor, ...]
    ) -> Iterator[tuple[str, Tensor]]:
        """Names, and keys [B, Hkv, S, D]; a step across heads puts D channels in the place of each."""
        plan, x = self.plan, key
        yield "before RoPE", x
        if not plan.before_rope:
            x = key_post
            yield "after RoPE", x
        if plan.center is not None:
            mean = plan.center.to(key.device, torch.float32)[None, :, None].expand_as(key)
            rows = (p.float() if p.is_floating_point() else p for p in positional)
            x = x - self.rope(mean, *rows)
            yield "mean removed", x
        if plan.key is not None:
            flat, heads = x.transpose(1, 2).flatten(2).cpu(), (key.shape[1], -1)
            rotated = dataclasses.replace(plan.key, order=None).apply(flat)
            yield "rotated", rotated.unflatten(2, heads).transpose(1, 2)
            if plan.key.order is not None:
                reordered = rotated[..., plan.key.order]
                yield "reordered", reordered.unflatten(2, heads).transpose(1, 2)

    def outliers(self) -> dict[str, list[float]]:
        """By step and head: the largest channel's RMS over the median channel's."""
        rms = {step: sums.sqrt() for step, sums in self.sums.items()}
        return {step: (x.amax(1) / x.median(1).values.clamp(min=1e-30)).tolist() for step, x in rms.items()}


@torch.inference_mode()
def key_outliers(
    model: PreTrainedModel,
    config: RotateKVConfig,
    calibration: Calibration | None,
    windows: Iterable[Tensor],
) -> list[dict[str, Any]]:
    """How far key channels stick out, layer by layer, as the recipe works on them.

    Args:
        model: the untransformed model.
        calibration: what the recipe's transforms are made of, where it needs any.
        windows: ids [1, T]; each window's first tokens are left out, as in calibration.

    Returns:
        A row for each layer: {"layer", "steps": {step: [Hkv ratios]}}; a ratio is the RMS of a head's
        largest channel over its median channel's, 1 where all are alike. Heads that a step mixes and channels
        that it sorts count in their new places.
    """
    sites = attention_sites(model)
    energies = {}
    for site in sites:
        shape = LayerShape(site.layer_index, site.kv_heads, site.query_heads, site.head_dim, site.value_dim)
        statistics = calibration.layers[site.layer_index] if calibration is not None else None
        energies[site.layer_index] = _Energy(site, recipes.plan_layer(config, shape, statistics))
    with observed(sites, energies):
        for window in windows:
            model(input_ids=window.to(model.device), use_cache=False)
    return [{"layer": layer, "steps": energy.outliers()} for layer, energy in sorted(energies.items())]
