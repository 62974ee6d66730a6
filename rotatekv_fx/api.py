"""transform(), restore(), calibrate(), report(): wires the parts; the only module that knows them all."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rotatekv_fx import ops, recipes, saving
from rotatekv_fx.binding import SUPPORTED_ATTENTION, Binding, Original, bind, unbind
from rotatekv_fx.cache import (
    AttentionRuntime,
    LayerSpec,
    PositionPlan,
    ReadKeys,
    key_map,
    key_map_before_rope,
    plan_positions,
)
from rotatekv_fx.cache.codec import Codec
from rotatekv_fx.calibration import Calibration, LayerStatistics, exact_dtype, model_fingerprint
from rotatekv_fx.capture import Capture, capture
from rotatekv_fx.collect import Progress, collect, progress_bar
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.errors import CalibrationError, ConfigError, InputError, MatchError, StateError
from rotatekv_fx.opaque import is_plain
from rotatekv_fx.parallel import share_of
from rotatekv_fx.passes.base import Rewrite
from rotatekv_fx.passes.normalize import normalize
from rotatekv_fx.passes.pipeline import dump_to, run_passes
from rotatekv_fx.recipes import LayerPlan, LayerShape
from rotatekv_fx.report import Report, SiteReport, describe_site
from rotatekv_fx.rope import LINEAR, Rope
from rotatekv_fx.sites import AttentionSite, Rejection, find_sites

logger = logging.getLogger(__name__)
_STATE = "rotatekv_state"


@dataclasses.dataclass(frozen=True)
class _Matched:
    sites: list[AttentionSite]
    positions: dict[int, PositionPlan]
    rejections: list[Rejection]


@dataclasses.dataclass(frozen=True)
class _State:
    """Kept on a transformed model."""

    report: Report
    originals: tuple[Original, ...]
    recipe: saving.Recipe


def transform(
    model: nn.Module, config: RotateKVConfig | None = None, calibration: Calibration | None = None
) -> nn.Module:
    """Give a Hugging Face decoder a packed KV cache, in place.

    Args:
        model: a decoder-only model of transformers, in eval mode; returned as the same object.
        config: settings; the default is the recipe "centered" at 2 bits.
        calibration: statistics of this model. Without them, a recipe that needs some lets the model write its
            own calibration text first, which is logged. Each process of a tensor-parallel model takes the
            whole model's, and uses its own heads' part: made on one device, it gives that device's codes.

    Returns:
        `model`. Its `generate` and `forward` run on the packed cache.

    Raises:
        ConfigError: a setting is unknown or does not fit the model.
        InputError: the model is no decoder with a KV cache.
        MatchError: layers were rejected (and not `allow_partial`), or none matched.
        CalibrationError: `calibration` belongs to another model.
        StateError: the model is transformed already, or in training mode.
        On any error the model is left as it was.
    """
    config = config or RotateKVConfig()
    recipe = recipes.get(config.recipe)
    _check_model(model)
    matched = _match(model)
    _check_layers(matched, config)
    if calibration is not None:
        calibration.check(model)  # once the model ran: 4-bit weights may be packed anew when they first do
    _check_matched(model, matched, config)
    if calibration is None and recipe.needs_calibration:
        calibration = collect(model, matched.sites, None, config.seed)
    matched = _fitting(matched, config, calibration)
    _check_matched(model, matched, config)
    bindings, reports = [], []
    with progress_bar("transform") as advance:
        for site in matched.sites:
            binding, site_report = _rewrite(site, matched.positions[site.layer_index], config, calibration)
            bindings.append(binding)
            reports.append(site_report)
            advance(len(reports), len(matched.sites))
    fingerprint = calibration.fingerprint if calibration is not None else model_fingerprint(model)
    originals = _bind_all(model, bindings, config.keep_originals)
    kept = sum(t.nbytes for o in originals for t in (o.parameters or {}).values())
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    found = Report(type(model).__name__, tuple(reports), tuple(matched.rejections), settings, kept)
    recipe_used = saving.Recipe(config, calibration if recipe.needs_calibration else None, fingerprint)
    setattr(model, _STATE, _State(found, tuple(originals), recipe_used))
    for name, method in _METHODS.items():
        setattr(model, name, types.MethodType(method, model))
    logger.info("Transformed %d attention modules of %s.", len(reports), type(model).__name__)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `transform`: the model's own forwards, and its original weights: bit for bit, unless the model was
    converted to another dtype since.

    Raises:
        StateError: the model is not transformed, or was with `keep_originals=False`.
    """
    state = _state(model)
    if any(o.parameters is None for o in state.originals):
        raise StateError("the original weights were not kept (keep_originals=False); load the model again.")
    for original in state.originals:
        unbind(model, original)
    delattr(model, _STATE)
    for name in _METHODS:
        vars(model).pop(name, None)
    return model


def _save_pretrained(self: nn.Module, save_directory: str | Path, **options: Any) -> None:
    """A transformed model's `save_pretrained`: original weights, and how to transform them again."""
    state = _state(self)
    saving.save(self, state.recipe, state.originals, save_directory, **options)


def _refuse_batching(self: nn.Module, *args: Any, **options: Any) -> None:
    """Continuous batching of a transformed model.

    Raises:
        StateError: always.
    """
    raise StateError(
        "continuous batching keeps keys and values in a paged 16-bit cache of its own, which packed layers "
        "cannot replace; call model.generate with a batch, or rotatekv_fx.restore(model) first."
    )


# What a transformed model does in another way than its class.
_METHODS = {
    "save_pretrained": _save_pretrained,
    "generate_batch": _refuse_batching,
    "init_continuous_batching": _refuse_batching,
    "continuous_batching_context_manager": _refuse_batching,
}


def calibrate(
    model: nn.Module,
    data: Iterable[Tensor] | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Collect the statistics that recipes need, in one pass. One calibration serves all recipes.

    Processes of a tensor-parallel model call this together; each is given the whole model's calibration.

    Args:
        model: the untransformed model.
        data: windows of token ids, each [T] or [1, T], best as long as the prompts to come: shorter ones cost
            recall of what stands far back. None lets the model write 12 windows of 1,024 tokens.
        seed: of self-generated text.
        progress: called as progress(done, total); None shows a progress bar.

    Raises:
        StateError: the model is transformed.
        CalibrationError: the data holds no usable windows.
        MatchError: no attention module matched.
    """
    return collect(model, attention_sites(model), data, seed, progress)


def report(model: nn.Module) -> Report:
    """What `transform` matched, rejected and inserted.

    Raises:
        StateError: the model is not transformed.
    """
    return _state(model).report


def inspect_model(model: nn.Module) -> Report:
    """What `transform` would match and reject; the model is left untouched.

    Raises:
        InputError: the model is no decoder with a KV cache.
        StateError: it is transformed already.
    """
    _check_model(model)
    matched = _match(model)
    sites = tuple(describe_site(s, matched.positions[s.layer_index].description) for s in matched.sites)
    return Report(type(model).__name__, sites, tuple(matched.rejections))


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention modules that `transform` would rewrite, as traced; the model is left untouched.

    Raises:
        InputError: the model is no decoder with a KV cache.
        StateError: it is transformed already.
        MatchError: no attention module matched.
    """
    _check_model(model)
    matched = _match(model)
    if not matched.sites:
        raise MatchError(_no_match(model, matched))
    return matched.sites


def _state(model: nn.Module) -> _State:
    state = getattr(model, _STATE, None)
    if state is None:
        raise StateError(
            f"this {type(model).__name__} is not transformed; call rotatekv_fx.transform(model) first."
        )
    return state


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"expected a transformers model, got {type(model).__name__}; load one with from_pretrained."
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError(
            "torch.compile has wrapped the model; give the model itself, and compile the transformed one."
        )
    if hasattr(model, _STATE):
        raise StateError("the model is transformed already; call rotatekv_fx.restore(model) first.")
    if model.training:
        raise StateError("the model is in training mode; call model.eval() first.")
    away = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if away:
        raise StateError(
            f"{len(away)} weights are not in memory, {away[0]} among them; load the model without offloading "
            "to the CPU or a disk (device_map over GPUs is fine)."
        )
    implementation = getattr(model.config, "_attn_implementation", "sdpa")
    if implementation not in SUPPORTED_ATTENTION:
        raise ConfigError(
            f"attention implementation {implementation!r} makes masks that packed layers cannot read; call "
            "model.set_attn_implementation('sdpa') first."
        )


def _match(model: nn.Module) -> _Matched:
    with progress_bar("trace") as advance:
        captures = capture(model, advance)
    for one in captures:
        if isinstance(one, Capture):
            normalize(one)
    found, rejections = find_sites(captures)
    shared = _shared_parameters(model)
    sites, positions, numbering = [], {}, {}
    for site in found:
        _keep_mergeable(site, shared)
        try:
            positions[site.layer_index] = plan_positions(site, numbering)
            sites.append(site)
        except MatchError as error:
            rejections.append(Rejection(site.name, site.layer_index, str(error)))
    return _Matched(sites, positions, rejections)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one name leads to: nothing may be merged into them."""
    seen: set[int] = set()
    return {
        id(p)
        for _, p in model.named_parameters(remove_duplicate=False)
        if id(p) in seen or seen.add(id(p))  # type: ignore[func-returns-value]
    }


def _keep_mergeable(site: AttentionSite, shared: set[int]) -> None:
    """Forget projections whose parameters are shared or quantized: their rotation is applied online."""
    for side in ("key", "value", "output"):
        projection = getattr(site, f"{side}_projection")
        if projection is None:
            continue
        names = [n for n in (projection.weight, projection.bias) if n is not None]
        own = dict(site.capture.module.named_parameters())
        if not all(n in own and is_plain(own[n]) for n in names):
            reason = f"{projection.weight} is quantized or computed"
        elif any(id(own[n]) in shared for n in names):
            reason = f"{projection.weight} is shared with another module"
        else:
            continue
        setattr(site, f"{side}_projection", None)
        site.unmerged[side] = reason


def _check_layers(matched: _Matched, config: RotateKVConfig) -> None:
    known = {found.layer_index for found in (*matched.sites, *matched.rejections)}
    unknown = sorted(set(config.layers) - known)
    if known and unknown:
        raise ConfigError(
            f"layers has settings for layer {unknown[0]}, and the model's attention layers are "
            f"{sorted(known)}; leave it out."
        )


def _check_matched(model: nn.Module, matched: _Matched, config: RotateKVConfig) -> None:
    if not matched.sites or (matched.rejections and not config.allow_partial):
        raise MatchError(_no_match(model, matched))


def _fitting(matched: _Matched, config: RotateKVConfig, calibration: Calibration | None) -> _Matched:
    """Reject sites that the recipe cannot serve."""
    sites, rejections = [], list(matched.rejections)
    recipe = recipes.get(config.recipe)
    for site in matched.sites:
        _check_statistics(site, calibration)
        error = float(calibration.layers[site.layer_index].rope_error) if calibration is not None else 0.0
        other = site.inline_input()
        if other is not None and site.capture.sliding:
            reason = f"its inline attention reads {other.name}, which has no columns for a sliding window"
            rejections.append(Rejection(site.name, site.layer_index, reason, other.name))
        elif other is not None and recipes.window_of(recipe, config):
            reason = (
                f"its inline attention reads {other.name}, which has no columns for a recent window; "
                "use window=0"
            )
            rejections.append(Rejection(site.name, site.layer_index, reason, other.name))
        elif recipe.needs_linear_rope and error > LINEAR:
            reason = (
                f"RoPE is not the last linear step on the key (relative error {error:.1g}), which recipe "
                f"{config.recipe!r} needs; use recipe='paper'"
            )
            rejections.append(Rejection(site.name, site.layer_index, reason, site.key_post.name))
        else:
            sites.append(site)
    return _Matched(sites, matched.positions, rejections)


def _check_statistics(site: AttentionSite, calibration: Calibration | None) -> None:
    if calibration is None:
        return
    layer = calibration.layers.get(site.layer_index)
    processes = share_of(site).size
    expected = [site.kv_heads * processes, site.head_dim]
    found = "no layer of that number" if layer is None else list(layer.key_sum.shape)
    if found != expected:
        spread = f" in {processes} processes" if processes > 1 else ""
        raise CalibrationError(
            f"layer {site.layer_index} has {expected} key heads and channels{spread}, its calibration "
            f"{found}; calibrate this model again."
        )


def _no_match(model: nn.Module, matched: _Matched) -> str:
    total = len(matched.sites) + len(matched.rejections)
    reasons = "\n".join(
        f"  layer {r.layer_index} ({r.name}): {r.reason}" + (f" [node {r.node}]" if r.node else "")
        for r in matched.rejections
    )
    remedy = "; allow_partial=True transforms the others" if matched.sites else ""
    share = f"{len(matched.rejections)} of {total} attention modules of {type(model).__name__}"
    return f"{share} rejected{remedy}:\n{reasons}"


def _rewrite(
    site: AttentionSite, positions: PositionPlan, config: RotateKVConfig, calibration: Calibration | None
) -> tuple[Binding, SiteReport]:
    """Run the passes over one site and collect everything that binding it needs."""
    statistics = calibration.layers.get(site.layer_index) if calibration is not None else None
    shape = LayerShape(
        site.layer_index,
        site.kv_heads,
        site.query_heads,
        site.head_dim,
        site.value_dim,
        share_of(site).rank * site.kv_heads,
    )
    plan = recipes.plan_layer(config, shape, statistics)
    if not plan.before_rope and plan.center is None:
        positions = PositionPlan((), (), [])
    transforms_after_rope = not plan.before_rope and plan.key is not None
    rope, read_rope, before_rope, places = None, None, {}, None
    if transforms_after_rope:
        rope = Rope(site).to(site.device)
    elif plan.before_rope and site.attention is not None:
        read_rope = Rope(site).to(site.device)
        before_rope = key_map_before_rope(plan, shape, read_rope, positions, site.device)
        if before_rope:
            (order,) = before_rope["before_rope_order"]
            places = order.long().to(site.device)
    described = describe_site(site, positions.description)
    rewrite = Rewrite(site, plan, positions.inputs, turns_on_read=bool(before_rope))
    folder = (
        dump_to(Path(config.dump_dir), f"layer_{site.layer_index:02d}")
        if config.dump_dir is not None
        else None
    )
    counts = run_passes(rewrite, dump=folder)
    module, example = site.capture.module, site.hidden_example
    device = example.device
    buffers = {**site.capture.constants, **rewrite.buffers}
    read_keys = None
    if counts["fuse_attention"]["fused"]:
        if before_rope:
            read_keys = ReadKeys(buffers.pop("key_inverse"), buffers.get("key_order"), read_rope)
            read_keys.to(device)
        buffers |= before_rope or key_map(plan, shape, rope or Rope(site).to(device), positions, device)
    runtime = AttentionRuntime(
        site.layer_index,
        _layer_spec(site, plan, statistics, places),
        positions,
        {name: tensor.to(device) for name, tensor in buffers.items()},
        rope,
        config.debug,
        read_keys,
    )
    parameters = {n: t.to(module.get_parameter(n)) for n, t in rewrite.folded.items()}
    lowered = {
        name: ops.lowered_to(name, device.type) for name in sorted(_ops_of(rewrite, runtime, device.type))
    }
    site_report = dataclasses.replace(described, passes=counts, lowered=lowered)
    reads_mask = site.attention is None and site.mask is not None
    mask = next(i for i in site.capture.inputs if i.name == site.mask.name) if reads_mask else None
    return Binding(
        site.capture, rewrite.graph, runtime, parameters, mask, _mark(config, statistics)
    ), site_report


def _mark(config: RotateKVConfig, statistics: LayerStatistics | None) -> int:
    """Number of a way to fold a layer's weights: of the settings and of the statistics they are based on."""
    digest = hashlib.sha256(config.fingerprint().encode())
    for field in dataclasses.fields(statistics) if statistics is not None else ():
        digest.update(getattr(statistics, field.name).contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7])


def _ops_of(rewrite: Rewrite, runtime: AttentionRuntime, device_type: str) -> set[str]:
    """Names of our ops that the rewritten graph and its packed layer run on such a device."""
    targets = (str(n.target) for n in rewrite.graph.nodes if n.op == "call_function")
    used = {t.split(".")[1] for t in targets if t.startswith("rotatekv.")}
    for attend in rewrite.graph.find_nodes(op="call_method", target="attend"):
        used.add("attend")
        if runtime.decodes:
            used.add("decode" if runtime.prefills else "decode_before_rope")
        if runtime.read_keys is not None:
            used.add("rotate")
        *_, softcap, sink_logits, causal = attend.args
        plain = causal and not softcap and sink_logits is None
        if runtime.prefills and plain and ops.lowered_to("prefill", device_type) == "triton":
            used.add("prefill")
    quantizers = (rewrite.plan.key_quantizer, rewrite.plan.value_quantizer)
    used |= {"quantize", "dequantize", "append"} if any(quantizers) else {"store"}
    return used | ({"select_sinks", "take_tokens", "restore_sinks"} if rewrite.plan.sinks else set())


def _layer_spec(
    site: AttentionSite, plan: LayerPlan, statistics: LayerStatistics | None, places: Tensor | None
) -> LayerSpec:
    """`places`: the key channel whose code lies in each place, if not its own."""
    dtype = site.hidden_example.dtype
    exact = exact_dtype(dtype, statistics)
    key = Codec(plan.key_quantizer, site.kv_heads, dtype, places)
    value = Codec(plan.value_quantizer, site.kv_heads, dtype)
    return LayerSpec(key, value, plan.sinks, plan.window, plan.slack, exact)


def _bind_all(model: nn.Module, bindings: list[Binding], keep_originals: bool) -> list[Original]:
    done: list[Original] = []
    parameters: list[dict[str, Any]] = []
    try:
        for binding in bindings:
            module = binding.capture.module
            parameters.append({n: module.get_parameter(n) for n in binding.parameters})
            done.append(bind(model, binding, keep_originals))
    except BaseException:
        for original, before in zip(done, parameters, strict=False):
            unbind(
                model, dataclasses.replace(original, parameters={n: p.detach() for n, p in before.items()})
            )
        raise
    return done
