"""insert: the passes on every attention site of a Dynamo graph, spliced back in its place.

    before:  hidden -> k_proj -> rope -> repeat -> scaled_dot_product_attention -> o_proj
                   `-> v_proj --------> repeat ----^

    after:   hidden -> k_proj -> rope -> rotate -> quantize -> dequantize -> rotate^-1 -> restore_sinks
                   `-> v_proj -> rotate -> quantize -> dequantize -> restore_sinks
                 -> attend -> rotate^-1 -> o_proj

Rotations are applied online here, and not merged into weights: parameters are inputs of a Dynamo graph, which
may change between calls (`load_state_dict`, an adapter) and would be held twice if they were made constants.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rotatekv_fx import recipes
from rotatekv_fx.backend.options import Options
from rotatekv_fx.backend.regions import OWN_CACHE, PARAMETERS, Region, fake_mode, find_regions
from rotatekv_fx.calibration import Calibration, exact_dtype
from rotatekv_fx.errors import CalibrationError, ConfigError
from rotatekv_fx.passes.base import Rewrite
from rotatekv_fx.passes.normalize import normalize
from rotatekv_fx.passes.pipeline import INSERT, WITHOUT_CACHE, dump_to, run_passes
from rotatekv_fx.recipes import LayerShape
from rotatekv_fx.rope import LINEAR
from rotatekv_fx.sites import AttentionSite, Rejection, find_sites

BUFFER = "rotatekv_"  # what names of inserted buffers begin with
logger = logging.getLogger(__name__)


def holds_our_ops(graph_module: fx.GraphModule) -> bool:
    """Whether a graph calls one of this package's ops."""
    return any(str(n.target).startswith("rotatekv.") for n in graph_module.graph.nodes)


def insert(graph_module: fx.GraphModule, options: Options) -> dict[int, dict[str, dict[str, int]]]:
    """Rewrite every attention site of an untransformed model's graph, in place.

    The numbers become those of the transformed model, for a forward without a cache. Attention that goes
    through a cache of transformers stays as it is, with one warning. Other sites that do not match stay too,
    each with a logged reason.

    Args:
        graph_module: a graph as Dynamo hands it to a backend.
        options: config and calibration.

    Returns:
        What each pass counted, by layer.

    Raises:
        ConfigError: the recipe lacks its calibration, or settings are given for a transformed model.
        CalibrationError: the calibration file cannot be used, or does not fit the model.
    """
    if holds_our_ops(graph_module):
        if options.given:
            raise ConfigError(
                f"the model is transformed already, so the options {', '.join(options.given)} have no effect;"
                " leave them out, or restore(model)."
            )
        return {}
    regions, rejections = find_regions(graph_module)
    if not regions and not rejections:
        return {}
    with unset_fake_temporarily():
        calibration = options.load_calibration()
    counts = {}
    numbers = Counter(region.capture.layer_index for region in regions)
    for region in reversed(regions):  # a region may read what an earlier one returns
        normalize(region.capture)
        sites, refused = find_sites([region.capture])
        rejections += refused
        for site in sites:
            reason = _unfit(region, site, options, calibration)
            if numbers[site.layer_index] > 1:
                reason = f"{numbers[site.layer_index]} attention modules are in blocks of this number"
            if reason is None:
                counts[site.layer_index] = _rewrite(graph_module, region, site, options, calibration)
            else:
                rejections.append(Rejection(site.name, site.layer_index, reason, site.key_post.name))
    graph_module.graph.lint()
    graph_module.recompile()
    _log(counts, rejections)
    return dict(sorted(counts.items()))


def _log(counts: dict[int, Any], rejections: list[Rejection]) -> None:
    if counts:
        logger.info("Inserted rotate, quantize and sink nodes in %d attention modules.", len(counts))
    for one in sorted(rejections, key=lambda r: r.layer_index):
        if one.reason == OWN_CACHE:
            _warn_of_cache()
        else:
            logger.warning(
                "Attention of layer %d (%s) stays as it is: %s [node %s].",
                one.layer_index,
                one.name,
                one.reason,
                one.node,
            )


@functools.cache
def _warn_of_cache() -> None:
    logger.warning(
        "The KV cache of this graph belongs to transformers and stays in 16 bit; its attention is compiled "
        "as it is: nothing is quantized, no memory is saved. Call rotatekv_fx.transform(model) first."
    )


def _unfit(
    region: Region, site: AttentionSite, options: Options, calibration: Calibration | None
) -> str | None:
    """Why the recipe cannot serve a site, or None.

    Raises:
        ConfigError: the recipe needs a calibration, and none is given.
        CalibrationError: it does not have this layer.
    """
    recipe, config = recipes.get(options.config.recipe), options.config
    causal = site.mask is not None or site.capture.arguments.static["is_causal"]
    if not causal and site.hidden_example.shape[1] != 1:
        return "its attention is not causal, as that of a decoder is"
    if len(_block_inputs(region, site)) != 1:
        return f"{len(_block_inputs(region, site))} activations enter its block, expected 1 to name sinks by"
    if calibration is None and recipe.needs_calibration:
        raise ConfigError(
            f"recipe {config.recipe!r} needs a calibration; give options={{'calibration': path}} with a file "
            "that calibrate(model).save(path) wrote, or use a recipe that needs none."
        )
    if calibration is None:
        return None
    statistics = calibration.layers.get(site.layer_index)
    found = None if statistics is None else tuple(statistics.key_sum.shape)
    if statistics is None or found != (site.kv_heads, site.head_dim):
        raise CalibrationError(
            f"layer {site.layer_index} has {[site.kv_heads, site.head_dim]} key heads and channels, the "
            f"calibration {found or 'no layer of that number'}; calibrate this model."
        )
    if recipe.needs_linear_rope and float(statistics.rope_error) > LINEAR:
        return f"RoPE is not linear on the key, which recipe {config.recipe!r} needs; use recipe='paper'"
    return None


def _rewrite(
    graph_module: fx.GraphModule,
    region: Region,
    site: AttentionSite,
    options: Options,
    calibration: Calibration | None,
) -> dict[str, dict[str, int]]:
    index = site.layer_index
    statistics = calibration.layers[index] if calibration is not None else None
    shape = LayerShape(index, site.kv_heads, site.query_heads, site.head_dim, site.value_dim)
    config = options.config
    site.key_projection = site.value_projection = site.output_projection = None
    with unset_fake_temporarily():
        plan = recipes.plan_layer(config, shape, statistics)
        if site.hidden_example.shape[1] == 1:
            plan = dataclasses.replace(plan, sinks=0)  # the packed cache chooses them among several tokens
        rewrite = Rewrite(site, plan, exact_dtype=exact_dtype(site.hidden_example.dtype, statistics))
        dump = None if config.dump_dir is None else dump_to(Path(config.dump_dir), f"layer_{index:02d}")
        counts = run_passes(rewrite, INSERT + WITHOUT_CACHE, dump)
    _splice(graph_module, region, rewrite)
    return counts


def _splice(graph_module: fx.GraphModule, region: Region, rewrite: Rewrite) -> None:
    """Put the rewritten graph in the place of the region's nodes, its buffers on the module."""
    whole, own = graph_module.graph, set(region.nodes)
    order = {node: i for i, node in enumerate(whole.nodes)}
    readers = [u for n in region.outputs for u in n.users if u not in own]
    (residual,) = _block_inputs(region, rewrite.site)
    constants = {**rewrite.site.capture.constants, **rewrite.buffers}
    env: dict[fx.Node, Any] = {}
    fakes = _Fakes(region)
    with whole.inserting_before(min(readers, key=order.__getitem__)):
        for node in rewrite.graph.nodes:
            if node.op == "placeholder":
                env[node] = residual if node is rewrite.residual else region.sources[node.name]
            elif node.op == "get_attr":
                place, _, name = str(node.target).partition(".")
                if place == PARAMETERS:
                    env[node] = region.sources[name]
                    continue
                buffer = f"{BUFFER}{region.capture.layer_index}_{name}"
                graph_module.register_buffer(
                    buffer, constants[name].to(rewrite.site.device), persistent=False
                )
                env[node] = whole.get_attr(buffer)
                fakes.of_buffer(env[node], getattr(graph_module, buffer))
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                env[node] = whole.node_copy(node, env.__getitem__)
                fakes.of_call(env[node])
    for output, result in zip(region.outputs, results, strict=True):
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    for node in reversed(region.nodes):
        whole.erase_node(node)


class _Fakes:
    """Gives spliced nodes the metadata that Dynamo's own nodes have."""

    def __init__(self, region: Region):
        self.stack = region.nodes[-1].meta.get("nn_module_stack")
        self.mode = fake_mode(region.sources.values())

    def of_buffer(self, node: fx.Node, buffer: Tensor) -> None:
        with self.mode:
            self._set(node, self.mode.from_tensor(buffer, static_shapes=True))

    def of_call(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        with self.mode, torch.no_grad():
            self._set(node, node.target(*args, **kwargs))

    def _set(self, node: fx.Node, value: Any) -> None:
        node.meta = {"example_value": value, "nn_module_stack": self.stack}


def _block_inputs(region: Region, site: AttentionSite) -> list[fx.Node]:
    """The activations [B, S, C] from outside the block that the site's hidden states are made of."""
    before = _before(region.sources[site.hidden.name], region.block)
    values = {n: n.meta.get("example_value") for n in before}
    return [n for n, v in values.items() if isinstance(v, Tensor) and v.dim() == 3]


def _before(start: fx.Node, block: frozenset[fx.Node]) -> set[fx.Node]:
    """The nodes outside of a block that `start` is computed from inside it."""
    outside, seen, pending = set(), set(), [start]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or node not in block:
            outside.add(node)
        else:
            pending += node.all_input_nodes
    return outside
