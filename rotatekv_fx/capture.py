"""Model -> one exported fx graph per attention module, with markers for the cache write and the attention.

No class names: an attention module is the innermost module on the call stack when `Cache.update` fires. Each
is exported by itself, its cache replaced by one whose `update` is a marker op and its attention function by
another marker op, so GQA repeats, SDPA or eager arithmetic, soft-caps and sink logits all sit in the marker's
arguments. A module that computes its attention itself is exported as it runs on a filled cache, so that the
number of keys and the number of new tokens are two sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from transformers import AttentionInterface, cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rotatekv_fx import masks
from rotatekv_fx.errors import InputError
from rotatekv_fx.naming import cache_argument
from rotatekv_fx.opaque import call_as_they_are, stubbed

aten = torch.ops.aten
KeyPath = tuple[str | int, ...]
MARKER = "rotatekv_capture"
# Dynamic cache layers that have a packed twin, those with a state-space model's states included.
_PACKABLE = {DynamicLayer, DynamicSlidingWindowLayer} | {
    getattr(cache_utils, f"LinearAttentionAnd{kind}Layer", DynamicLayer)
    for kind in ("FullAttention", "SlidingWindowAttention")
}
PAST = "past"  # input of an export that shows how many tokens the cache holds
# Where constants of a captured graph live on the attention module once it is rewritten.
RUNTIME_NAME = "rotatekv"


@torch.library.custom_op("rotatekv_capture::kv_update", mutates_args=())
def kv_update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for `Cache.update`: [B, Hkv, S, D] keys after RoPE and values. Only ever traced."""
    return key.clone(), value.clone()


@kv_update.register_fake
def _(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("rotatekv_capture::kv_update_after", mutates_args=())
def kv_update_after(key: Tensor, value: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """`kv_update` on a cache that holds P tokens, `past` [P]: returns [B, Hkv, P + S, D]. Only traced."""
    before = (key.shape[0], key.shape[1], past.shape[0])
    return (
        torch.cat([key.new_zeros(*before, key.shape[3]), key], 2),
        torch.cat([value.new_zeros(*before, value.shape[3]), value], 2),
    )


@kv_update_after.register_fake
def _(key: Tensor, value: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    length = past.shape[0] + key.shape[2]
    return (
        key.new_empty(key.shape[0], key.shape[1], length, key.shape[3]),
        value.new_empty(value.shape[0], value.shape[1], length, value.shape[3]),
    )


@torch.library.custom_op("rotatekv_capture::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: list[Tensor]) -> Tensor:
    """Stands for the attention function: [B, Hq, S, D] queries -> [B, S, Hq, Dv]. Only ever traced."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: list[Tensor]) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("rotatekv_capture::held", mutates_args=())
def held(device: torch.device) -> Tensor:
    """Stands for the number of tokens in the cache before the write, int64 []: none without a cache."""
    return torch.zeros((), dtype=torch.int64, device=device)


@held.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """What the model passed to its attention function besides query, key, value and mask."""

    static: dict[str, Any]
    extra_names: tuple[str, ...]


_capturing = threading.local()


def _marker_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    tensors = {
        k: v for k, v in sorted(kwargs.items()) if isinstance(v, Tensor) and k not in IGNORED_ARGUMENTS
    }
    static = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor) and k not in IGNORED_ARGUMENTS}
    _capturing.arguments.append(AttentionArguments(static, tuple(tensors)))
    return torch.ops.rotatekv_capture.attention(
        query, key, value, attention_mask, list(tensors.values())
    ), None


# Passed along by decoder layers, without effect on the numbers once a mask is given.
IGNORED_ARGUMENTS = frozenset(
    (
        *("position_ids", "cache_position", "position_embeddings", "layer_idx", "use_cache", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    )
)
AttentionInterface.register(MARKER, _marker_attention)


class _Refused(Exception):
    """An attention module that cannot be traced, with the reason."""


class _MarkerCache(Cache):
    """A cache whose `update` and length are marker ops; `past` [P] shows how many tokens it holds."""

    def __init__(self, layers: int, device: torch.device):
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])
        self.device, self.written = device, False
        self.past: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.written = True
        if self.past is None:
            return torch.ops.rotatekv_capture.kv_update(key, value)
        return torch.ops.rotatekv_capture.kv_update_after(key, value, self.past)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Tensor:
        """The marker of the length; inline attention has none.

        Raises:
            _Refused: a traced number of tokens would stay what it was.
        """
        if self.written or self.past is not None:
            raise _Refused("it asks the cache for its length after writing to it")
        return torch.ops.rotatekv_capture.held(self.device)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise _Refused("it asks the cache for more than keys and values")

    get_mask_sizes = get_conv_state = get_recurrent_state = has_previous_state = _refuse
    update_conv_state = update_recurrent_state = _refuse


@dataclasses.dataclass
class Call:
    """One recorded call of an attention module."""

    module: nn.Module
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layer_index: int
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    past: int  # tokens that the cache gave it besides the new ones
    outputs: dict[int, Tensor]  # of submodules that return one tensor, by module id
    origins: dict[int, Tensor]  # of inputs that came from another device, by tensor id
    sliding: bool  # its cache layer forgets tokens
    refusal: str = ""  # why it cannot be traced, found while it ran


@dataclasses.dataclass
class Producer:
    """A module call that turned token positions into rows (a rotary embedding): `module`'s output `index`."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None


@dataclasses.dataclass
class CapturedInput:
    """A tensor the attention module receives: where it sits in (args, kwargs), and what produced it.

    `origin` is `example`, or what that was copied from when it came from another device.
    """

    name: str
    path: KeyPath
    example: Tensor
    producer: Producer | None
    origin: Tensor | None = None

    def __post_init__(self) -> None:
        self.origin = self.example if self.origin is None else self.origin


@dataclasses.dataclass
class Capture:
    """The exported graph of one attention module.

    `graph` is rooted at the attention module: its placeholders are `inputs`, in order; parameters and buffers
    are `get_attr` nodes by their own names; lifted constants are `get_attr` nodes below `rotatekv.` and
    listed in `constants`. `arguments` is None when the module computes its attention inline. `sliding` says
    that its cache layer forgets tokens. Batch and length are symbols, unless the graph has `fixed_sizes` and
    will run at those only.
    """

    name: str
    module: nn.Module
    block_name: str
    layer_index: int
    graph: fx.Graph
    inputs: list[CapturedInput]
    cache_path: KeyPath
    constants: dict[str, Tensor]
    arguments: AttentionArguments | None
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    sliding: bool = False
    fixed_sizes: bool = False


@dataclasses.dataclass(frozen=True)
class CaptureFailure:
    """An attention module whose export failed, with the exporter's own reason."""

    name: str
    layer_index: int
    reason: str


def lookup(args: tuple[Any, ...], kwargs: dict[str, Any], path: KeyPath) -> Any:
    """What stands at `path` in (args, kwargs), or None where the call leaves it out."""
    found: Any = (args, kwargs)
    for step in path:
        if isinstance(found, dict):
            found = found.get(step)
        elif found is not None:
            found = found[step] if step < len(found) else None
    return found


def capture(
    model: nn.Module, progress: Callable[[int, int], None] | None = None
) -> list[Capture | CaptureFailure]:
    """Export every attention module of a decoder.

    Args:
        model: a Hugging Face decoder in eval mode.
        progress: called as progress(done, total) after each module.

    Raises:
        InputError: the model cannot run as a decoder with a KV cache (an encoder, say).
    """
    empty = Recording(*(_record_calls(model, batch, length) for batch, length in ((2, 6), (3, 9))))
    filled: Recording | None = None
    names = {module: name for name, module in model.named_modules()}
    results: list[Capture | CaptureFailure] = []
    for key, call in empty.calls.items():
        try:
            if call.refusal:
                raise _Refused(call.refusal)
            one = _capture_module(model, names, key, empty, marked=True)
            if one is None:
                filled = filled or Recording(
                    *(_record_calls(model, *size) for size in ((2, 6, 5), (3, 9, 8)))
                )
                one = _capture_module(model, names, key, filled, marked=False)
            results.append(one)
        except _Refused as no:
            results.append(CaptureFailure(names[call.module], call.layer_index, str(no)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the exporter raises many kinds; all mean "cannot be traced"
            message = str(error).strip().partition("\n")[0] or "no message"
            reason = f"export failed: {type(error).__name__}: {message}"
            results.append(CaptureFailure(names[call.module], call.layer_index, reason))
        if progress is not None:
            progress(len(results), len(empty.calls))
    return results


@dataclasses.dataclass(frozen=True)
class Recording:
    """Calls of the attention modules, by module id, at two sizes, and what made their positional inputs."""

    first: tuple[dict[int, Call], dict[int, Producer]]
    second: tuple[dict[int, Call], dict[int, Producer]]

    @property
    def calls(self) -> dict[int, Call]:
        return self.first[0]


def _record_calls(
    model: nn.Module, batch: int, length: int, past: int = 0
) -> tuple[dict[int, Call], dict[int, Producer]]:
    """Run a padded batch of dummy ids on a cache that holds `past` tokens, and note which module called
    `Cache.update`, and which made rows of positions.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder; transform() takes decoder-only models."
        )
    stack: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
    calls: dict[int, Call] = {}
    writers: dict[int, list[nn.Module]] = {}
    ran: dict[type, set[int]] = {}
    outputs: dict[int, Tensor] = {}
    origins: dict[int, Tensor] = {}
    known: list[Tensor] = []  # tensors that other devices' layers may receive copies of
    handing_on: list[Call] = []  # calls that left tensors in their arguments
    producers: dict[int, Producer] = {}
    kept: list[Any] = []  # keeps recorded tensors alive, so that their ids stay theirs

    class RecordingCache(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
            result = super().update(key, value, layer_idx, *args, **kwargs)
            if not stack:  # the forward that fills the cache is not recorded
                return result
            module, call_args, call_kwargs, _ = stack[-1]
            before, shapes = calls.get(id(module)), (tuple(key.shape), tuple(value.shape))
            held, sliding = result[0].shape[2] - key.shape[2], self.layers[layer_idx].is_sliding
            call = Call(
                module, module, call_args, call_kwargs, layer_idx, *shapes, held, outputs, origins, sliding
            )
            calls[id(module)] = call
            writers[id(module)] = [frame[0] for frame in stack]
            kind = type(self.layers[layer_idx])
            if kind not in _PACKABLE:
                call.refusal = f"its cache layer is a {kind.__name__}, which has no packed twin"
            elif before is not None and before.kwargs is not call_kwargs:
                call.refusal = "the module serves several layers of the cache"
            return result

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append((module, args, kwargs, _tensors_in(args, kwargs)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        *_, before = stack.pop()
        inputs = _tensors_in(args, kwargs)
        ran.setdefault(type(module), set()).add(id(module))
        if isinstance(output, Tensor):
            outputs[id(module)] = output
        if id(module) in calls and len(inputs) != len(before):
            handing_on.append(calls[id(module)])
        if any(_is_positions(t, length) for t in inputs):
            results = output if isinstance(output, tuple | list) else (output,)
            for index, tensor in enumerate(results):
                if isinstance(tensor, Tensor) and id(tensor) not in producers:
                    place = index if isinstance(output, tuple | list) else None
                    producers[id(tensor)] = Producer(module, args, kwargs, place)
                    known.append(tensor)
            kept.append((args, kwargs, output))

    device = _embedding_device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, config.vocab_size - 1), (batch, past + length), generator=generator)
    ids = ids.to(device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding, so that a mask is materialised
    parameters, named_cache = inspect.signature(model.forward).parameters, cache_argument(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = RecordingCache(config=model.config)

    def run(cache: Cache, ids: Tensor, start: int, stop: int) -> Any:
        known.append(positions[:, start:stop])
        named = {"position_ids": known[-1]} if "position_ids" in parameters else {}
        part = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **named}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a compiled call runs no hooks
            return model(**part, **{named_cache: cache}, use_cache=True)

    hooks = []
    try:
        if past:
            run(cache, ids, 0, past)
        hooks += [m.register_forward_pre_hook(enter, with_kwargs=True) for m in model.modules()]
        hooks += [m.register_forward_hook(leave, with_kwargs=True) for m in model.modules()]
        output = run(cache, ids, past, past + length)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} failed on a dummy batch: {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    kind = type(model).__name__
    remedy = "transform() takes decoder-only language models, such as those of AutoModelForCausalLM."
    if not calls:
        raise InputError(f"No module of {kind} wrote to the KV cache; {remedy}")
    if not past and not _masks_are_causal(calls, length):  # or they are spelled the other way round (mpt)
        other = ids.clone()
        other[:, -1] = torch.where(ids[:, -1] == 3, 4, 3)
        changed = run(RecordingCache(config=model.config), other, 0, length)
        causal = _looks_back_only(output, changed, mask[:, :-1].bool())
    else:
        causal = True
    if not causal:
        raise InputError(f"{kind} is not causal: its attention masks let tokens see later ones; {remedy}")
    for call in handing_on:
        if ran[type(call.module)] - set(calls):  # modules of its kind that wrote nothing read what it left
            call.refusal = "the module hands tensors on to later layers through its arguments"
    for key, call in calls.items():
        call.block = _enclosing_block(model, writers, key)
    kept.append(calls)
    origins.update(_origins(calls, known))
    received = {id(origins.get(id(t), t)) for t in _call_tensors(calls)}
    producers = {k: v for k, v in producers.items() if k in received}
    return calls, producers


def _embedding_device(model: nn.Module) -> torch.device:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise InputError(
            f"{type(model).__name__} has no token embeddings; transform() takes language models."
        )
    return weight.device


def _masks_are_causal(calls: dict[int, Call], length: int) -> bool:
    """Whether no mask that attention modules received lets a token see a later one."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for tensor in _call_tensors(calls):
        square = tensor.dim() == 4 and tensor.shape[-2:] == (length, length) and not tensor.is_complex()
        if square and bool(masks.as_bool(tensor)[..., later.to(tensor.device)].any()):
            return False
    return True


def _looks_back_only(first: Any, second: Any, real: Tensor) -> bool:
    """Whether two outputs that differ in the last token are alike at `real` others [B, S - 1], but for
    rounding.
    """
    a, b = (
        next(t for t in pytree.tree_leaves(dict(o)) if isinstance(t, Tensor) and t.dim() == 3)
        for o in (first, second)
    )
    rounding = min(64 * torch.finfo(a.dtype).eps, 0.01)
    a, b = (x[:, :-1].float()[real.to(x.device)] for x in (a, b))
    return bool((a - b).abs().max() <= rounding * a.abs().max())


def _call_tensors(calls: dict[int, Call]) -> Iterator[Tensor]:
    for call in calls.values():
        yield from _tensors_in(call.args, call.kwargs)


def _origins(calls: dict[int, Call], known: list[Tensor]) -> dict[int, Tensor]:
    """What tensors were copied from that came to a module from another device, by id."""
    found = {}
    for tensor in _call_tensors(calls):
        if any(tensor is k for k in known) or id(tensor) in found:
            continue
        same = [k for k in known if _moved(k, tensor)]
        if len(same) == 1:
            found[id(tensor)] = same[0]
    return found


def _moved(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device != b.device
    return alike and torch.equal(a.to(b.device), b)


def _tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors in nested arguments; mappings that pytree takes for leaves are opened too."""
    leaves = pytree.tree_leaves((args, kwargs))
    opened = [x for leaf in leaves for x in (leaf.values() if isinstance(leaf, Mapping) else [leaf])]
    return [t for t in pytree.tree_leaves(opened) if isinstance(t, Tensor)]


def _is_positions(tensor: Tensor, length: int) -> bool:
    return tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2 and tensor.shape[1] == length


def _enclosing_block(model: nn.Module, writers: dict[int, list[nn.Module]], key: int) -> nn.Module:
    """The repeated block around an attention module: a ModuleList's member, else the outermost module of its
    own.
    """
    members = {id(child) for m in model.modules() if isinstance(m, nn.ModuleList) for child in m}
    stack = writers[key]
    for module in stack:
        if id(module) in members:
            return module
    others = {id(m) for other, frames in writers.items() if other != key for m in frames}
    return next((m for m in stack if id(m) not in others and m is not model), stack[-1])


class _Wrapped(nn.Module):
    """The attention module as a function of its tensors only."""

    def __init__(self, module: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, cache: _MarkerCache):
        super().__init__()
        self.module, self.leaves, self.spec, self.cache = module, leaves, spec, cache

    def forward(self, tensors: list[Tensor], past: Tensor | None = None) -> Any:
        self.cache.past, self.cache.written = past, False
        it = iter(tensors)
        leaves = [next(it) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.module(*args, **kwargs)


def _capture_module(
    model: nn.Module, names: dict[nn.Module, str], key: int, recording: Recording, marked: bool
) -> Capture | None:
    """Export one module, `marked` with the attention marker, or with its own arithmetic on a filled cache.

    Returns:
        None where the marker does not stand for all of the module's attention: it does not use the attention
        interface, or in a way that `ops.attend` does not cover, or a foreign implementation name has changed
        its branches (falcon).
    """
    (calls, producers), (others, _) = recording.first, recording.second
    call, second = calls[key], others[key]

    def is_cache(leaf: Any) -> bool:
        return isinstance(leaf, Cache)

    located, spec = pytree.tree_flatten_with_path((call.args, call.kwargs), is_leaf=is_cache)
    other_leaves = pytree.tree_leaves((second.args, second.kwargs), is_leaf=is_cache)
    leaves: list[Any] = []
    tensors: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    inputs: list[CapturedInput] = []
    cache_path: KeyPath = ()
    device = next(t.device for t in _tensors_in(call.args, call.kwargs))
    cache = _MarkerCache(1 + max(c.layer_index for c in calls.values()), device)
    for (path, leaf), other in zip(located, other_leaves, strict=True):
        place = tuple(getattr(p, "key", getattr(p, "idx", None)) for p in path)
        if is_cache(leaf):
            cache_path, leaf = place, cache
        if isinstance(leaf, Tensor):
            changed = (i for i in range(leaf.dim()) if leaf.shape[i] != other.shape[i])
            tensors.append(leaf)
            shapes.append(dict.fromkeys(changed, torch.export.Dim.AUTO))
            origin = call.origins.get(id(leaf), leaf)
            inputs.append(CapturedInput("", place, leaf, producers.get(id(origin)), origin))
        leaves.append(leaf)
    arguments: tuple[Any, ...] = (tensors,)
    dynamic: tuple[Any, ...] = (shapes,)
    if not marked:
        arguments += (torch.zeros(call.past, dtype=torch.int64, device=tensors[0].device),)
        dynamic += ({0: torch.export.Dim.AUTO},)
    config = getattr(call.module, "config", model.config)
    # each export has sizes of its own, so what the exporter caches of an operation is never found again
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with uncached, _markers(config, marked) as recorded, stubbed(call.module, call.outputs), torch.no_grad():
        program = torch.export.export(
            _Wrapped(call.module, leaves, spec, cache), arguments, dynamic_shapes=dynamic, strict=False
        )
    if marked:
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        _check_sizes(program, longest)
    found = recorded[-1] if recorded else None
    if found is not None and config._attn_implementation == "sdpa":
        # transformers' SDPA knows no soft-cap: 5.17 drops one (gemma2), later versions refuse it
        found.static.pop("softcap", None)
    graph, constants = _module_rooted(program, inputs)
    call_as_they_are(graph)
    if marked and not (found is not None and understood(found) and _attends_once(graph)):
        return None
    return Capture(
        name=names[call.module],
        module=call.module,
        block_name=names[call.block],
        layer_index=call.layer_index,
        graph=graph,
        inputs=inputs,
        cache_path=cache_path,
        constants=constants,
        arguments=found,
        key_shape=call.key_shape,
        value_shape=call.value_shape,
        sliding=call.sliding,
    )


def _check_sizes(program: torch.export.ExportedProgram, longest: int | None) -> None:
    """Refuse a module that takes another branch at other sizes than it was traced with.

    A bound at the model's longest context is the end of a table, not a branch.
    """
    for symbol, bounds in program.range_constraints.items():
        if symbol.is_symbol and (bounds.lower > 2 or bounds.upper < (longest or math.inf)):
            raise _Refused(f"it takes another branch where a size leaves {bounds.lower} to {bounds.upper}")


def _attends_once(graph: fx.Graph) -> bool:
    """Whether there is one attention marker, which reads the cached key and value themselves, and whose mask
    was made without them.
    """
    markers = graph.find_nodes(op="call_function", target=torch.ops.rotatekv_capture.attention.default)
    if len(markers) != 1:
        return False
    update = torch.ops.rotatekv_capture.kv_update.default
    if any(n.target is not operator.getitem or n.args[0].target is not update for n in markers[0].args[1:3]):
        return False
    pending, seen = [markers[0].args[3]], set()
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return not any(n.target is update for n in seen)


def understood(arguments: AttentionArguments) -> bool:
    """Whether `ops.attend` covers everything the model passed to its attention function."""
    known = {"scaling", "softcap", "dropout", "is_causal", "sliding_window", "s_aux"}
    active = {k for k, v in arguments.static.items() if v is not None and v is not False}
    return active | set(arguments.extra_names) <= known


@contextlib.contextmanager
def _markers(config: Any, marked: bool) -> Iterator[list[AttentionArguments]]:
    """Route attention to the marker while a module is exported, and put the model's own choice back."""
    own = config._attn_implementation
    _capturing.arguments = []
    if marked:
        config._attn_implementation_internal = MARKER
    try:
        yield _capturing.arguments
    finally:
        config._attn_implementation_internal = own


def _module_rooted(
    program: torch.export.ExportedProgram, inputs: list[CapturedInput]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy the exported graph so that it is rooted at the attention module, and name the inputs."""
    signature = program.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph, env, constants = fx.Graph(), {}, {}
    users = iter(inputs)
    sizes: list[fx.Node] = []  # how many tokens the cache held, and what is computed from it before the write
    written = False

    def constant(name: str, tensor: Tensor) -> fx.Node:
        flat = "constant_" + name.replace(".", "_")
        constants[flat] = tensor.detach().clone()
        return graph.get_attr(f"{RUNTIME_NAME}.{flat}")

    def copy(node: fx.Node) -> None:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)

    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            target = lifted[node.name]
            if target in program.state_dict:
                env[node] = graph.get_attr(target.removeprefix("module."))
            else:
                env[node] = constant(target, program.constants[target])
        elif node.op == "placeholder" and node.name == PAST:
            past = node
        elif node.op == "placeholder":
            user = next(users)
            last = user.path[-1]
            name = last if isinstance(last, str) else f"input_{last}"
            if isinstance(last, int) and len(user.path) > 2:
                name = f"{user.path[-2]}_{last}"
            env[node] = graph.placeholder(name)
            user.name = env[node].name
        elif node.op == "get_attr":
            env[node] = constant(node.target, getattr(program.graph_module, node.target))
        elif node.op == "output":
            values = fx.node.map_arg(list(node.args[0]), env.__getitem__)
            graph.output(pytree.tree_unflatten(values, program.call_spec.out_spec))
        elif node.target is torch.ops.rotatekv_capture.kv_update_after.default:
            if any(n in sizes for n in node.all_input_nodes):
                raise _Refused("what it caches depends on the number of cached tokens")
            key, value = (env[n] for n in node.args[:2])
            env[node] = graph.call_function(torch.ops.rotatekv_capture.kv_update.default, (key, value))
            held, written = _held(graph, env[node], key, node), True
            for size in sizes:
                if past in size.all_input_nodes:
                    env[size] = held
                else:
                    copy(size)
        elif not written and any(n in sizes or n.name == PAST for n in node.all_input_nodes):
            sizes.append(node)
        else:
            copy(node)
        if node in env:
            env[node].meta = dict(node.meta)
    return graph, constants


def _held(graph: fx.Graph, write: fx.Node, key: fx.Node, traced: fx.Node) -> fx.Node:
    """The number of tokens that the cache held before a write: of all keys, less the new ones."""
    keys = graph.call_function(operator.getitem, (write, 0))
    keys.meta["val"] = traced.meta["val"][0]
    total = graph.call_function(aten.sym_size.int, (keys, 2))
    new = graph.call_function(aten.sym_size.int, (key, 2))
    held = graph.call_function(operator.sub, (total, new))
    total.meta["val"], new.meta["val"] = keys.meta["val"].shape[2], key.meta["val"].shape[2]
    held.meta["val"] = total.meta["val"] - new.meta["val"]
    return held
