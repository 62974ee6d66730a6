"""What stands in for a layer's runtime while its model is exported: the cache as inputs and outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from rotatekv_fx.cache.runtime import AttentionRuntime
from rotatekv_fx.capture import RUNTIME_NAME
from rotatekv_fx.export import columns
from rotatekv_fx.export.attention import Form, many, single, unpacked
from rotatekv_fx.export.fold import Mean, fold_inverse
from rotatekv_fx.export.parts import Part, Parts
from rotatekv_fx.export.state import (
    SIDES,
    SINKS,
    State,
    Step,
    chosen_sinks,
    encode,
    history,
    history_names,
    kept_sinks,
    left,
    made_names,
    none_left,
)
from rotatekv_fx.ops import REFERENCES
from rotatekv_fx.report import SiteReport

ops = torch.ops.rotatekv


class ExportCache(DynamicCache):
    """A cache whose layers only count tokens; the states of packed layers are beside them.

    Attributes:
        states: of each layer before the step.
        runtimes: of each layer.
        outputs: of each layer, what the step makes: new rows of the history, and the other tensors anew.
    """

    def __init__(
        self,
        config: Any,
        step: Step,
        states: dict[int, State],
        parts: Parts,
        runtimes: dict[int, ExportRuntime],
    ):
        super().__init__(config=config)
        self.step, self.states, self.parts, self.runtimes = step, states, parts, runtimes
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
        self.rotates, self.read_keys = runtime.rope is not None, runtime.read_keys
        self.mean = Mean(runtime.key_center, runtime.rope, self.positions) if runtime.centers else None
        self.blocks = 0
        after_rope = self.rotates or not (self.positions.stored or self.read_keys is not None)
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
        if self.read_keys is not None:
            mask, keys, values, *rows = self.update(cache, key, value, positions, residual, mask)
            keys = self.read_keys(keys, *rows)
            return ops.attend.default(query, keys, values, mask, scale, softcap, sink_logits, causal)
        spec, step = self.spec, cache.step
        tensors = {"query": query, **self._tensors(cache, key, value, residual, mask)}
        if sink_logits is not None:
            tensors["sink_logits"] = sink_logits
        form = Form(spec, scale, softcap, self.blocks)
        batch, heads, tokens, _ = query.shape
        outputs = {
            **self._made(step, tensors),
            "": (query.dtype, (batch, tokens, heads, self.site.value_dim)),
        }
        if not self.blocks:
            return self._call(cache, Part(form, many), tensors, outputs)[0]
        tensors |= {"turn": self.turn, "bias": self._bias(cache, tensors["visible"])}
        if spec.window:
            tensors |= self._left(cache, tensors)
        return self._call(cache, Part(form, many, single), tensors, outputs, step.several)[0]

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
        spec, step = self.spec, cache.step
        tensors = self._tensors(cache, key, value, residual, mask)
        (batch, heads, tokens, _), numbers = (
            key.shape,
            self._numbers(step, cache.states[self.layer_index], tensors["visible"]),
        )
        columns_read = numbers["coded"].shape[0] + spec.sinks
        columns_read += numbers["exact"].shape[0] if spec.window else 0
        outputs = self._made(step, tensors)
        outputs["seen"] = torch.bool, (batch, 1, tokens, columns_read)
        for name, x in (("keys", key), ("values", value)):
            outputs[name] = x.dtype, (batch, heads, columns_read, x.shape[3])
        visible, keys, values = self._call(cache, Part(spec, unpacked), tensors, outputs)
        if mask is not None and mask.dtype is not torch.bool:
            zeros = torch.zeros_like(visible, dtype=mask.dtype)
            visible = zeros.masked_fill(~visible, torch.finfo(mask.dtype).min)
        return visible, keys, values, *(() if self.rotates else self._rows(step, numbers, tensors))

    def _call(
        self,
        cache: ExportCache,
        part: Part,
        tensors: State,
        outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        condition: Tensor | None = None,
    ) -> list[Tensor]:
        """Run a part that puts tokens in: the layer's state goes to the cache, other results come back."""
        results = cache.parts.call(part, tensors, list(outputs.values()), condition)
        made = dict(zip(outputs, results, strict=True))
        state = cache.states[self.layer_index]
        cache.outputs[self.layer_index] = {n: tensors[n] if n in SINKS else made.pop(n) for n in state}
        return list(made.values())

    def _tensors(
        self, cache: ExportCache, key: Tensor, value: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> State:
        """What `attention.many` takes, but for the query and what belongs to the attention."""
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
            tensors |= {"matrix": self.key_matrix, "inverse": self.key_inverse}
        if self.mean is not None:
            features, of_new = self._features(step, numbers["coded"], state)
            tensors |= {"features": features, "new_features": of_new, "spread": self.mean.spread}
        return tensors

    def _numbers(self, step: Step, state: State, visible: Tensor) -> State:
        """Numbers of the tokens in the coded columns, of the exact ones and of those in the window after the
        step, and which of them queries see: padding too sees itself, since a query has to see something.
        Layers of a kind share them.
        """
        if self.sliding not in step.memo:
            device, start, window = step.queries.device, step.tokens - step.new, self.spec.window
            recent = state["recent_keys"].shape[2] if window else 0
            leaving = step.leaving.shape[0] if window else step.new
            history = next(iter(state.values())).shape[0]
            first = start - recent - history
            coded = torch.arange(history + leaving, device=device) + first
            exact = torch.arange(recent + step.new, device=device) + (start - recent)
            own = torch.arange(step.tokens, device=device) == step.queries[:, None]
            visible = visible | own
            step.memo[self.sliding] = {
                "coded": coded,
                "exact": exact,
                "first": torch.zeros(1, dtype=torch.int64, device=device) + first,
                "seen_codes": columns.coded(visible, coded, step.queries, window),
                "seen_exact": columns.exact(visible, exact, step.queries, window),
            }
            if window:
                step.memo[self.sliding]["kept"] = step.staying + (start - recent)
        return step.memo[self.sliding]

    def _sinks(self, cache: ExportCache, state: State, new: State) -> State:
        """The sinks after the step."""
        before = {name: state[name] for name in SINKS}
        outputs = [(t.dtype, t.shape) for t in before.values()]
        choose = cache.step.prompt & cache.step.several
        part = Part(self.spec.sinks, chosen_sinks, kept_sinks)
        return dict(zip(SINKS, cache.parts.call(part, {**before, **new}, outputs, choose), strict=True))

    def _alike(self, cache: ExportCache) -> list[int]:
        """The layers for which a single token's masks and codes can be made together with this one's."""

        def kind(r: ExportRuntime) -> tuple[Any, ...]:
            return r.sliding, r.spec, r.site.head_dim, r.site.value_dim, bool(r.blocks), r.positions.key

        return [i for i, r in cache.runtimes.items() if kind(r) == kind(self)]

    def _bias(self, cache: ExportCache, visible: Tensor) -> Tensor:
        """What to add to a single query's scores."""
        memo, layers = cache.step.memo[self.sliding], self._alike(cache)
        if f"bias {self.layer_index}" not in memo:
            tensors = {"visible": visible, **{n: memo[n] for n in ("coded", "first", "kept") if n in memo}}
            if self.spec.sinks:
                tensors |= {f"sink_tokens_{i}": cache.states[i]["sink_tokens"] for i in layers}
            batch = cache.states[layers[0]]["sink_tokens"].shape[0] if self.spec.sinks else visible.shape[0]
            width = self.spec.sinks + sum(memo[n].shape[0] for n in ("coded", "kept") if n in memo)
            count = len(layers) if self.spec.sinks else 1
            outputs = [(torch.float32, (batch, 1, 1, width))] * count
            found = cache.parts.call(Part(self.spec.window, columns.biases), tensors, outputs)
            memo |= {f"bias {i}": found[at % count] for at, i in enumerate(layers)}
        return memo[f"bias {self.layer_index}"]

    def _left(self, cache: ExportCache, own: State) -> State:
        """New rows of the history, where a single token comes in and the window's first leaves."""
        step, layers, names = cache.step, self._alike(cache), history(self.spec)
        memo = step.memo[self.sliding]
        if f"{names[0]} {self.layer_index}" not in memo:
            tensors = {n: own[n] for n in ("leaving", "new_features") if n in own}
            for side in SIDES:
                tensors |= {f"recent_{side}s_{i}": cache.states[i][f"recent_{side}s"] for i in layers}
            others = [cache.runtimes[i] for i in layers]
            if self.mean is not None:
                tensors["spread"] = torch.cat([r.mean.spread for r in others])
            if self.rotates:
                tensors["matrix"] = _in_a_row([r.key_matrix for r in others], own["key"].shape)
            (batch, leaving), states = (own["key"].shape[0], own["leaving"].shape[0]), cache.states[layers[0]]
            sizes = {n: states[n].shape[2] for n in names}
            outputs = [
                (states[n].dtype, (leaving, batch, len(layers) * sizes[n], *states[n].shape[3:]))
                for n in names
            ]
            rows = cache.parts.call(Part(self.spec, none_left, left), tensors, outputs, step.several)
            for name, row in zip(names, rows, strict=True):
                pieces = row.split(sizes[name], 2)
                memo |= {f"{name} {i}": piece for i, piece in zip(layers, pieces, strict=True)}
        return {f"leaving {name}": memo[f"{name} {self.layer_index}"] for name in names}

    def _made(self, step: Step, tensors: State) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of `state.made_names`."""
        tokens, spec = tensors["key"].shape[2], self.spec
        made = {}
        for name in made_names(spec):
            x, size = tensors[name], step.staying if name.startswith("recent") else step.leaving
            rows = size.shape[0] if spec.window else tokens
            shape = (*x.shape[:2], rows, x.shape[3]) if name.startswith("recent") else (rows, *x.shape[1:])
            made[name] = x.dtype, shape
        return made

    def _features(self, step: Step, numbers: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Features [B, 1, C, F] of the position term of tokens `numbers`, and [B, 1, L, F] of those that
        become codes; layers of a kind share them.
        """
        memo = step.memo[self.sliding]
        name = f"features of {self.positions.key}"
        if name not in memo:
            features = self.mean.features(step.position_ids.index_select(1, numbers))[:, None]
            history = next(iter(state.values())).shape[0]
            leaving = step.leaving.shape[0] if self.spec.window else step.new
            new = torch.arange(leaving, device=numbers.device) + history
            memo[name], memo[f"new {name}"] = features, features.index_select(2, new)
        return memo[name], memo[f"new {name}"]

    def _rows(self, step: Step, numbers: State, tensors: State) -> tuple[Tensor, ...]:
        """The positional inputs of every column."""
        if not self.positions.stored:
            return ()
        ids = step.position_ids
        every = [numbers["coded"].expand(ids.shape[0], -1)]
        if self.spec.sinks:
            every.append(tensors["sink_tokens"].long().clamp(min=0))
        if self.spec.window:
            every.append(numbers["exact"].expand(ids.shape[0], -1))
        return self.positions.decode((ids.gather(1, torch.cat(every, 1)).int()[:, None, :, None],))


def _in_a_row(matrices: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Matrices [n or 1, M, M] of layers whose keys have this shape, as of one layer with all their heads."""
    if len(matrices[0]) == 1 and all(torch.equal(matrices[0], m) for m in matrices):
        return matrices[0]
    blocks = shape[1] * shape[3] // matrices[0].shape[-1]
    return torch.cat([m.expand(blocks, -1, -1) for m in matrices])


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
