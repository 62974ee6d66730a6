"""Collecting calibration statistics: one pass, float64 sums, memory independent of the text's length."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import tqdm

from rotatekv_fx.calibration import PER_HEAD, Calibration, LayerStatistics, model_fingerprint
from rotatekv_fx.capture import lookup
from rotatekv_fx.errors import CalibrationError
from rotatekv_fx.opaque import dense, numbers, whole
from rotatekv_fx.parallel import Share, share_of
from rotatekv_fx.rope import Rope, attributes
from rotatekv_fx.sites import AttentionSite

logger = logging.getLogger(__name__)
aten = torch.ops.aten
Progress = Callable[[int, int], None]

GENERATED_WINDOWS = 12
GENERATED_LENGTH = 1024
SINK_TOKENS = 4  # first tokens of a window, left out of the moments


class Receiver(Protocol):
    """Takes one window's keys before and after RoPE, values, queries and positional inputs."""

    def add(
        self,
        key: Tensor,
        key_post: Tensor,
        value: Tensor,
        query: Tensor | None,
        positional: tuple[Tensor, ...],
    ) -> None: ...


class _Sums:
    """Running sums of one layer. Sums stay on the model's device in float64."""

    def __init__(self, site: AttentionSite):
        self.site, self.rope, self.share = site, Rope(site), share_of(site)
        self.values: dict[str, Tensor] = {}
        self.partner: Tensor | None = None
        self.error = 0.0

    def add(
        self,
        key: Tensor,
        key_post: Tensor,
        value: Tensor,
        query: Tensor | None,
        positional: tuple[Tensor, ...],
    ) -> None:
        """Add one window.

        Args:
            key, key_post: [B, Hkv, S, D] before and after RoPE.
            value: [B, Hkv, S, Dv].
            query: [B, Hq, S, D] after RoPE, or None where the attention is inline.
            positional: the positional inputs.
        """
        if self.partner is None:
            self.partner, self.error = self.rope.partners(tuple(p[:1, :32] for p in positional))
        self._add("tokens", _number(key, key.shape[0] * key.shape[2]))
        self._add("key_sum", key.double().sum((0, 2)))
        for name, heads in (("key_norm", key), ("value_norm", value)):
            self._most(name, self.share.total(heads.double().square().sum((1, 3))).max().sqrt())
        if key.shape[2] <= SINK_TOKENS:
            return
        a, b = (
            x[:, SINK_TOKENS:].to(key.device)
            for x in self.rope.coefficients(self.partner, positional, key.shape[2])
        )
        a, b = (x.expand(key.shape[0], -1, -1) for x in (a, b))
        kept, turned, value = (x[:, :, SINK_TOKENS:].double() for x in (key, key_post, value))
        self._add("kept", _number(key, kept.shape[0] * kept.shape[2]))
        self._add("key_mean", kept.sum((0, 2)))
        self._add("key_second", _moment(turned, turned))
        self._add("key_a", _moment(turned, a.unsqueeze(1)))
        self._add("key_b", _moment(turned, b.unsqueeze(1)))
        pairs = ((a, a), (a, b), (b, b))
        self._add("turns", torch.stack([torch.einsum("bsc,bse->ce", x, y) for x, y in pairs]))
        self._add("value_sum", value.sum((0, 2)))
        self._add("value_second", _moment(value, value))
        if query is not None:
            heads = query[:, :, SINK_TOKENS:].double().unflatten(1, (key.shape[1], -1))
            self._add("query_second", torch.einsum("bhrsd,bhrse->hde", heads, heads) / heads.shape[2])

    def finish(self) -> LayerStatistics:
        """The statistics of all processes' heads, on the CPU."""
        values = dict(self.values)
        heads, dim, value_dim = self.site.kv_heads, self.site.head_dim, self.site.value_dim
        if "kept" not in values:
            raise CalibrationError(
                f"calibration windows are too short; give at least {SINK_TOKENS + 1} tokens."
            )
        values["key_mean"] = values["key_mean"] / values["kept"]
        values.setdefault("query_second", values["key_second"].new_zeros(heads, dim, dim))
        weight = _value_weight(self.site, self.share, heads, value_dim)
        values["value_weight"] = weight.to(values["value_sum"].device)
        values |= {name: self.share.gathered(values[name]) for name in PER_HEAD}
        values = {name: tensor.cpu() for name, tensor in values.items()}
        values["partner"] = self.partner
        values["rope_error"] = torch.tensor(min(self.error, 1e9), dtype=torch.float64)
        return LayerStatistics(**values)

    def _add(self, name: str, new: Tensor) -> None:
        self.values[name] = self.values[name] + new if name in self.values else new

    def _most(self, name: str, new: Tensor) -> None:
        self.values[name] = torch.maximum(self.values[name], new) if name in self.values else new


def _number(like: Tensor, number: int) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64, device=like.device)


def _moment(x: Tensor, y: Tensor) -> Tensor:
    """Sum over batch and tokens of x y^T, per head: [B, H, S, D], [B, H or 1, S, E] -> [H, D, E]."""
    return (x.mT @ y).sum(0)


def _value_weight(site: AttentionSite, share: Share, heads: int, dim: int) -> Tensor:
    """Sum of Wo^T Wo over the query heads of each KV head."""
    found = _output_weight(site, share)
    if found is None:
        return torch.eye(dim, dtype=torch.float64).repeat(heads, 1, 1)
    weight, features = found
    weight = weight[:, features.to(weight.device)]
    weight = weight.double().unflatten(1, (heads, -1))  # [out, Hkv, r, Dv]
    return torch.einsum("ohrd,ohre->hde", weight, weight)


def _output_weight(site: AttentionSite, share: Share) -> tuple[Tensor, Tensor] | None:
    """The weight [out, in] of the output projection, if it can be read, and which of its inputs each channel
    [Hq, Dv] is. A process with all heads may hold a part of the weight.
    """
    if (projection := site.output_projection) is not None:
        return site.capture.module.get_parameter(projection.weight).detach(), projection.features
    if (output := site.opaque_output) is None:
        return None
    weight = getattr(site.capture.module.get_submodule(output.module), "weight", None)
    weight = None if weight is None else dense(whole(weight) if share.group is None else numbers(weight))
    fits = weight is not None and weight.dim() == 2 and weight.shape[1] == output.features.numel()
    return (weight, output.features) if fits else None


def collect(
    model: nn.Module,
    sites: list[AttentionSite],
    data: Iterable[Tensor] | None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Run the untransformed model over calibration windows and sum what its attention sites see.

    Args:
        model: the model, untransformed.
        sites: its attention sites.
        data: token ids, [T] or [1, T] a window; None lets the model write its own.
        seed: of self-generated text.
        progress: called as progress(done, total) after each window, total 0 where unknown; None shows a bar.

    Raises:
        CalibrationError: there are no windows, a window is no row of token ids, or they hold fewer different
            tokens than a head has channels, which would leave directions of keys and values unseen.
    """
    source = "given token ids"
    if data is None:
        logger.info(
            "No calibration data: %s writes %d windows itself.", type(model).__name__, GENERATED_WINDOWS
        )
        data, source = generate_windows(model, seed, progress), f"self-generated, seed {seed}"
    total = len(data) if hasattr(data, "__len__") else 0
    sums = {site.layer_index: _Sums(site) for site in sites}
    windows, seen = 0, set()
    takes = inspect.signature(model.forward).parameters
    last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    uncompiled = torch.compiler.set_stance("force_eager")  # hooks collect
    with observed(sites, sums), progress_bar("calibrate", progress) as advance, torch.no_grad(), uncompiled:
        for window in data:
            row = _row(model, window)
            model(input_ids=row, use_cache=False, **last_logits_only)
            windows += 1
            seen.update(row.unique().tolist())
            advance(windows, total)
    if not windows:
        raise CalibrationError("calibration data holds no windows; give at least one row of token ids.")
    layers = {index: s.finish() for index, s in sums.items()}
    channels = max(site.head_dim for site in sites)
    if len(seen) < channels:
        raise CalibrationError(
            f"calibration data holds {len(seen)} different tokens, fewer than the {channels} channels of a "
            "head; give a more varied text."
        )
    bad = [
        i
        for i, s in layers.items()
        if not all(bool(getattr(s, f.name).isfinite().all()) for f in dataclasses.fields(s))
    ]
    if bad:
        raise CalibrationError(
            f"keys or values of layers {bad} are not finite on the calibration data; use other data."
        )
    return Calibration(layers, model_fingerprint(model), f"{source}, {windows} windows")


def _row(model: nn.Module, window: Tensor) -> Tensor:
    row = window.unsqueeze(0) if isinstance(window, Tensor) and window.dim() == 1 else window
    fits = isinstance(row, Tensor) and row.dim() == 2 and row.shape[1] >= 2 and not row.is_floating_point()
    if not fits:
        raise CalibrationError(
            f"a calibration window is {list(row.shape) if isinstance(row, Tensor) else type(row).__name__}; "
            "give integer token ids [T] or [1, T] with T of at least 2."
        )
    return row.to(model.get_input_embeddings().weight.device)


@contextlib.contextmanager
def observed(sites: list[AttentionSite], sums: Mapping[int, Receiver]) -> Iterator[None]:
    """While it lasts, each site's receiver is given what the site's graph makes of its module's inputs."""
    hooks = []
    for site in sites:
        observe, add = observer(site), sums[site.layer_index].add

        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site=site, observe=observe, add=add
        ):
            inputs = {i.name: lookup(args, kwargs, i.path) for i in site.capture.inputs}
            add(*observe(*inputs.values()), tuple(inputs[p.name] for p in site.positional))

        hooks.append(site.capture.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def observer(site: AttentionSite) -> fx.GraphModule:
    """The site's graph as a function of the module's inputs: keys before and after RoPE, values, queries or
    None.
    """
    graph, env = fx.Graph(), {}
    for node in site.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, env.__getitem__)
    key = env[site.key_pre]
    if site.key_pre_transposed:
        key = graph.call_function(aten.transpose.int, (key, 1, 2))
    query = env[site.attention.args[0]] if site.attention is not None else None
    graph.output((key, env[site.key_post], env[site.value], query))
    graph.eliminate_dead_code()
    return fx.GraphModule(attributes(site, graph), graph)


class _Report(StoppingCriteria):
    """Never stops; reports each generated token."""

    def __init__(self, advance: Progress, total: int):
        self.advance, self.total = advance, total

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.advance(input_ids.shape[1], self.total)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_windows(model: nn.Module, seed: int = 0, progress: Progress | None = None) -> list[Tensor]:
    """12 windows of up to 1,024 tokens that the model writes from its start token, at temperature 1."""
    config = model.config.get_text_config(decoder=True)
    start = next(
        (t for t in (config.bos_token_id, config.eos_token_id, config.pad_token_id) if t is not None), 0
    )
    start = start[0] if isinstance(start, list) else start
    length = min(GENERATED_LENGTH, getattr(config, "max_position_embeddings", None) or GENERATED_LENGTH)
    device = model.get_input_embeddings().weight.device
    ids = torch.full((GENERATED_WINDOWS, 1), start, device=device)
    with torch.random.fork_rng(), progress_bar("generate calibration text", progress) as advance:
        torch.manual_seed(seed)
        windows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_beams=1,
            max_new_tokens=length - 1,
            eos_token_id=None,
            pad_token_id=start,
            stopping_criteria=StoppingCriteriaList([_Report(advance, length)]),
        )
    return list(windows)


@contextlib.contextmanager
def progress_bar(label: str, progress: Progress | None = None) -> Iterator[Progress]:
    """The caller's progress function, or a bar of transformers' own kind (its settings can turn it off)."""
    if progress is not None:
        yield progress
        return
    with tqdm(desc=label, leave=False) as bar:
        shown = 0

        def advance(done: int, total: int) -> None:
            nonlocal shown
            bar.total = total or None
            bar.update(done - shown)
            shown = done

        yield advance
