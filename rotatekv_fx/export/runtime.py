"""What stands in for a layer's runtime while its model is exported: the cache as inputs and outputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from rotatekv_fx.cache.runtime import AttentionRuntime
from rotatekv_fx.capture import RUNTIME_NAME
from rotatekv_fx.export import columns
from rotatekv_fx.export.attention import (
    Form,
    folded,
    unpacked,
    unpacked_keys,
    unpacked_values,
    visible_columns,
)
from rotatekv_fx.export.fold import Mean, fold_inverse
from rotatekv_fx.export.parts import Part, Parts
from rotatekv_fx.export.state import (
    SIDES,
    SINKS,
    State,
    Step,
    chosen_sinks,
    encode,
    history_names,
    kept_sinks,
    stored,
)
from rotatekv_fx.ops import REFERENCES
from rotatekv_fx.report import SiteReport


class ExportCache(DynamicCache):
    """A cache whose layers only count tokens; the states of packed layers are beside them.

    Attributes:
        states: of each layer before the step.
        outputs: of each layer, what the step makes: new rows of the history, and the other tensors anew.
    """

    def __init__(self, config: Any, step: Step, states: dict[int, State], parts: Parts):
        super().__init__(config=config)
        self.step, self.states, self.parts = step, states, parts
        self.outputs: dict[int, State] = {}
        self.layers = [_Counter(layer, step) for layer in self.layers]


class _Counter(DynamicLayer):
    """Shows a mask as wide as the sequence, also where the model's own layer would have dropped tokens."""

    def __init__(self, replaced: DynamicLayer, step: Step):
        super().__init__()
        self.is_sliding, self.is_initialized, self.counted = replaced.is_sliding, True, step
        if replaced.is_sliding:
            self.sliding_window = replaced.sliding_window

    def get_seq_length(self) -> int:
        return self.counted.tokens - self.counted.new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.counted.tokens, 0


class ExportRuntime(nn.Module):
    """Has the `update` of an `AttentionRuntime`, on the tensors of an `ExportCache`.

    Where keys go straight to the attention, `update` returns a `Read` in the place of all it returns; where
    they pass through more of the graph (an inverse rotation and RoPE, or inline attention), tensors.
    """

    def __init__(self, runtime: AttentionRuntime, site: SiteReport, sliding: bool):
        super().__init__()
        self.layer_index, self.spec, self.positions = runtime.layer_index, runtime.spec, runtime.positions
        self.site, self.sliding = site, sliding
        for name, tensor in runtime.named_buffers(recurse=False):
            self.register_buffer(name, tensor, persistent=False)
        self.rotates = runtime.rope is not None
        self.mean = Mean(runtime.key_center, runtime.rope, self.positions) if runtime.centers else None
        self.blocks = 0
        after_rope = self.rotates or not self.positions.stored
        if after_rope and None not in (self.spec.key.quantizer, self.spec.value.quantizer):
            inverse = runtime.key_inverse if self.rotates else None
            turn, self.blocks = fold_inverse(inverse, self.spec.key, site.head_dim)
            self.register_buffer("turn", turn, persistent=False)
        self.residual: Tensor | None = None

    def empty_state(self, batch: int, history: int, recent: int) -> State:
        """Tensors like those of the layer's cache, with that many tokens."""
        spec, site = self.spec, self.site
        dims, heads = (site.head_dim, site.value_dim), site.kv_heads
        state: State = {}
        for side, codec, dim in zip(SIDES, (spec.key, spec.value), dims, strict=True):
            parts = encode(codec, torch.zeros(batch, heads, history, dim, dtype=codec.dtype))
            rows = (part.movedim(2, 0).contiguous() for part in parts)
            state |= dict(zip(history_names(codec, side), rows, strict=True))
        for side, dim in zip(SIDES, dims, strict=True):
            if spec.window:
                shape = (batch, heads, recent, dim)
                state[f"recent_{side}s"] = torch.zeros(shape, dtype=spec.exact_dtype)
            if spec.sinks:
                shape = (batch, heads, spec.sinks, dim)
                state[f"sink_{side}s"] = torch.zeros(shape, dtype=spec.exact_dtype)
        if spec.sinks:
            state["sink_scores"] = torch.full((batch, spec.sinks), -1.0)
            state["sink_tokens"] = torch.full((batch, spec.sinks), -1, dtype=torch.int32)
        return state

    def observe(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the enclosing block: keep its input [B, S, C]."""
        leaves = (*args, *kwargs.values())
        self.residual = next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())

    def take_residual(self, cache: ExportCache) -> Tensor | None:
        """What `observe` kept, once."""
        residual, self.residual = self.residual, None
        return residual

    def held(self, cache: ExportCache, device: torch.device) -> Tensor:
        """As `AttentionRuntime.held`."""
        return torch.full((), cache.step.tokens - cache.step.new, device=device)

    def attend(
        self,
        cache: ExportCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: tuple[Tensor, ...],
        residual: Tensor | None,
        mask: Tensor | None,
        scale: float,
        softcap: float,
        sink_logits: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """As `AttentionRuntime.attend`; the new state goes to `cache.outputs`."""
        spec = self.spec
        tensors = {"query": query, **self._store(cache, key, value, residual, mask).tensors}
        if sink_logits is not None:
            tensors["sink_logits"] = sink_logits
        form = Form(spec.key, spec.value, scale, softcap, self.blocks)
        if not self.blocks:
            return unpacked(form, tensors)
        tensors["turn"] = self.turn
        batch, heads, tokens, _ = query.shape
        outputs = [(query.dtype, (batch, tokens, heads, self.site.value_dim))]
        (result,) = cache.parts.call(Part(form, unpacked, folded), tensors, outputs, cache.step.several)
        return result

    def update(
        self,
        cache: ExportCache,
        key: Tensor,
        value: Tensor,
        positions: tuple[Tensor, ...],
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """As `AttentionRuntime.update`; the new state goes to `cache.outputs`."""
        stored_layer = self._store(cache, key, value, residual, mask)
        tensors = stored_layer.tensors
        visible = visible_columns(tensors)
        if mask is not None and mask.dtype is not torch.bool:
            zeros = torch.zeros_like(visible, dtype=mask.dtype)
            visible = zeros.masked_fill(~visible, torch.finfo(mask.dtype).min)
        rows = () if self.rotates else self._rows(cache.step, stored_layer)
        keys, values = unpacked_keys(self.spec.key, tensors), unpacked_values(self.spec.value, tensors)
        return visible, keys, values, *rows

    def _store(
        self, cache: ExportCache, key: Tensor, value: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> _Stored:
        step, spec, state = cache.step, self.spec, cache.states[self.layer_index]
        visible = columns.visible_tokens(mask, step.queries, step.tokens)
        numbers = self._numbers(step, state, visible)
        new = {"key": key, "value": value, "visible": visible, "queries": step.queries}
        sinks = self._sinks(cache, state, {**new, "residual": residual}) if spec.sinks else {}
        tensors = {**state, **sinks, **new}
        tensors |= {name: numbers[name] for name in ("first", "seen_codes", "seen_exact")}
        if spec.window:
            tensors |= {"leaving": step.leaving, "staying": step.staying}
        if self.rotates:
            tensors["matrix"] = self.key_matrix
        if self.mean is not None:
            tensors |= {"features": self._features(step, numbers["coded"]), "spread": self.mean.spread}
        outputs = self._outputs(step, state, new, numbers)
        results = cache.parts.call(Part(spec, stored), tensors, list(outputs.values()))
        made = dict(zip(outputs, results, strict=True))
        cache.outputs[self.layer_index] = {n: sinks[n] if n in sinks else made[f"new {n}"] for n in state}
        read = {n: t for n, t in made.items() if not n.startswith("new ")}
        if self.mean is not None:
            read |= {"features": tensors["features"], "spread": self.mean.spread}
        if self.rotates:
            read["inverse"] = self.key_inverse
        return _Stored(read, numbers, sinks)

    def _numbers(self, step: Step, state: State, visible: Tensor) -> State:
        """Numbers of the tokens in the coded columns and of the exact ones, and which of them queries see;
        layers of a kind share them.
        """
        if self.sliding not in step.memo:
            device, start, window = step.queries.device, step.tokens - step.new, self.spec.window
            recent = state["recent_keys"].shape[2] if window else 0
            leaving = step.leaving.shape[0] if window else step.new
            history = next(iter(state.values())).shape[0]
            first = start - recent - history
            coded = torch.arange(history + leaving, device=device) + first
            exact = torch.arange(recent + step.new, device=device) + (start - recent)
            step.memo[self.sliding] = {
                "coded": coded,
                "exact": exact,
                "first": torch.zeros(1, dtype=torch.int64, device=device) + first,
                "seen_codes": columns.coded(visible, coded, step.queries, window),
                "seen_exact": columns.exact(visible, exact, step.queries, window),
            }
        return step.memo[self.sliding]

    def _sinks(self, cache: ExportCache, state: State, new: State) -> State:
        """The sinks after the step."""
        before = {name: state[name] for name in SINKS}
        outputs = [(t.dtype, t.shape) for t in before.values()]
        choose = cache.step.prompt & cache.step.several
        part = Part(self.spec.sinks, chosen_sinks, kept_sinks)
        return dict(zip(SINKS, cache.parts.call(part, {**before, **new}, outputs, choose), strict=True))

    def _outputs(
        self, step: Step, state: State, new: State, numbers: State
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of what `stored` returns; a "new " one goes to the layer's state."""
        key, value, spec = new["key"], new["value"], self.spec
        (batch, heads, tokens, _), coded = key.shape, numbers["coded"].shape[0]
        history = [
            n
            for codec, side in zip((spec.key, spec.value), SIDES, strict=True)
            for n in history_names(codec, side)
        ]
        leaving = step.leaving.shape[0] if spec.window else tokens
        exact = spec.sinks + (numbers["exact"].shape[0] if spec.window else 0)
        made = {f"new {n}": (state[n].dtype, (leaving, *state[n].shape[1:])) for n in history}
        if spec.window:
            staying = step.staying.shape[0]
            for name, x in (("recent_keys", key), ("recent_values", value)):
                made[f"new {name}"] = spec.exact_dtype, (batch, heads, staying, x.shape[3])
        for name in history:
            _, rows, groups, *rest = state[name].shape
            made[name] = state[name].dtype, (rows, groups, coded, *rest)
        made["seen_codes"] = torch.bool, (batch, 1, tokens, coded)
        made["seen_exact"] = torch.bool, (batch, 1, tokens, exact)
        for name, x in (("exact_keys", key), ("exact_values", value)):
            made[name] = x.dtype, (batch, heads, exact, x.shape[3])
        return made

    def _features(self, step: Step, numbers: Tensor) -> Tensor:
        """Features [B, F, N] of the position term of tokens `numbers`; layers of a kind share them."""
        memo = step.memo[self.sliding]
        name = f"features of {self.positions.key}"
        if name not in memo:
            memo[name] = self.mean.features(step.position_ids.index_select(1, numbers))
        return memo[name]

    def _rows(self, step: Step, layer: _Stored) -> tuple[Tensor, ...]:
        """The positional inputs of every column."""
        if not self.positions.stored:
            return ()
        ids = step.position_ids
        every = [layer.numbers["coded"].expand(ids.shape[0], -1)]
        if layer.sinks:
            every.append(layer.sinks["sink_tokens"].long().clamp(min=0))
        if self.spec.window:
            every.append(layer.numbers["exact"].expand(ids.shape[0], -1))
        return self.positions.decode((ids.gather(1, torch.cat(every, 1)).int()[:, None, :, None],))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A layer after new tokens went in.

    Attributes:
        tensors: what its attention reads, as `attention.unpacked` takes it, but for the query.
        numbers: of the tokens in its columns.
        sinks: after the step.
    """

    tensors: State
    numbers: State
    sinks: State


class Lowered(TorchFunctionMode):
    """Runs the package's ops as plain torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, torch._ops.OpOverload) or func.namespace != "rotatekv":
            return func(*args, **(kwargs or {}))
        return REFERENCES[func._schema.name.partition("::")[2]](*args)


@contextlib.contextmanager
def exporting(model: nn.Module, sites: tuple[SiteReport, ...]) -> Iterator[dict[int, ExportRuntime]]:
    """Put an `ExportRuntime` in the place of each layer's runtime, and take them out again.

    Yields:
        The runtimes by layer.
    """
    kinds = DynamicCache(config=model.config).layers
    replaced: dict[nn.Module, AttentionRuntime] = {}
    hooks: list[tuple[dict[int, Any], int, Any]] = []
    runtimes: dict[int, ExportRuntime] = {}
    try:
        for site in sites:
            module = model.get_submodule(site.name)
            runtime = replaced[module] = module.get_submodule(RUNTIME_NAME)
            stand_in = ExportRuntime(runtime, site, kinds[site.layer_index].is_sliding)
            module.add_module(RUNTIME_NAME, stand_in)
            runtimes[site.layer_index] = stand_in
            for block in model.modules():
                for key, hook in block._forward_pre_hooks.items():
                    if getattr(hook, "__self__", None) is runtime:
                        hooks.append((block._forward_pre_hooks, key, hook))
                        block._forward_pre_hooks[key] = stand_in.observe
        yield runtimes
    finally:
        for module, runtime in replaced.items():
            module.add_module(RUNTIME_NAME, runtime)
        for registry, key, hook in hooks:
            registry[key] = hook
