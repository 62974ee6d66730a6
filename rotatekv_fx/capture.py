"""Model -> one exported fx graph per attention module, with markers for the cache write and the attention.

No class names: an attention module is the innermost module on the call stack when `Cache.update` fires. Each
is exported by itself, its cache replaced by one whose `update` is a marker op and its attention function by
another marker op, so GQA repeats, SDPA or eager arithmetic, soft-caps and sink logits all sit in the marker's
arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rotatekv_fx.errors import InputError

aten = torch.ops.aten
KeyPath = tuple[str | int, ...]
MARKER = "rotatekv_capture"
# Where constants of a captured graph live on the attention module once it is rewritten.
RUNTIME_NAME = "rotatekv"


@torch.library.custom_op("rotatekv_capture::kv_update", mutates_args=())
def kv_update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for `Cache.update`: [B, Hkv, S, D] keys after RoPE and values. Only ever traced."""
    return key.clone(), value.clone()


@kv_update.register_fake
def _(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("rotatekv_capture::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: list[Tensor]) -> Tensor:
    """Stands for the attention function: [B, Hq, S, D] queries -> [B, S, Hq, Dv]. Only ever traced."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: list[Tensor]) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


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


class _MarkerCache(Cache):
    """A cache whose `update` is the marker op."""

    def __init__(self, layers: int):
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.rotatekv_capture.kv_update(key, value)


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
    repeated: bool = False


@dataclasses.dataclass
class Producer:
    """A module call that turned token positions into rows (a rotary embedding): `module`'s output `index`."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None


@dataclasses.dataclass
class CapturedInput:
    """A tensor the attention module receives: where it sits in (args, kwargs), and what produced it."""

    name: str
    path: KeyPath
    example: Tensor
    producer: Producer | None


@dataclasses.dataclass
class Capture:
    """The exported graph of one attention module.

    `graph` is rooted at the attention module: its placeholders are `inputs`, in order; parameters and buffers
    are `get_attr` nodes by their own names; lifted constants are `get_attr` nodes below `rotatekv.` and
    listed in `constants`. `arguments` is None when the module computes its attention inline. Batch and length
    are symbols, unless the graph has `fixed_sizes` and will run at those only.
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
    first, producers = _record_calls(model, 2, 6)
    second, _ = _record_calls(model, 3, 9)
    names = {module: name for name, module in model.named_modules()}
    results: list[Capture | CaptureFailure] = []
    for key, call in first.items():
        try:
            if call.repeated:
                raise ValueError("the module serves several layers of the cache")
            results.append(_capture_module(model, names, call, second[key], producers, len(first)))
        except Exception as error:  # the exporter raises many kinds; all mean "cannot be traced"
            message = str(error).strip().partition("\n")[0] or "no message"
            reason = f"export failed: {type(error).__name__}: {message}"
            results.append(CaptureFailure(names[call.module], call.layer_index, reason))
        if progress is not None:
            progress(len(results), len(first))
    return results


def _record_calls(model: nn.Module, batch: int, length: int) -> tuple[dict[int, Call], dict[int, Producer]]:
    """Run a padded batch of dummy ids and note which module called `Cache.update`, and which made rows of
    positions.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder; transform() takes decoder-only models."
        )
    stack: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    calls: dict[int, Call] = {}
    repeated: set[int] = set()  # modules that several calls of which wrote
    writers: dict[int, list[nn.Module]] = {}
    producers: dict[int, Producer] = {}
    kept: list[Any] = []  # keeps recorded tensors alive, so that their ids stay theirs

    class RecordingCache(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
            module, call_args, call_kwargs = stack[-1]
            if id(module) in calls and calls[id(module)].args is not call_args:
                repeated.add(id(module))
            calls[id(module)] = Call(
                module, module, call_args, call_kwargs, layer_idx, tuple(key.shape), tuple(value.shape)
            )
            writers[id(module)] = [frame[0] for frame in stack]
            return super().update(key, value, layer_idx, *args, **kwargs)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append((module, args, kwargs))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stack.pop()
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(_is_positions(t, length) for t in inputs):
            outputs = output if isinstance(output, tuple | list) else (output,)
            for index, tensor in enumerate(outputs):
                if isinstance(tensor, Tensor) and id(tensor) not in producers:
                    place = index if isinstance(output, tuple | list) else None
                    producers[id(tensor)] = Producer(module, args, kwargs, place)
            kept.append((args, kwargs, output))

    device = _embedding_device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, config.vocab_size - 1), (batch, length), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding, so that a mask is materialised
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "past_key_values" not in parameters and not takes_any:
        raise InputError(
            f"{type(model).__name__}.forward takes no past_key_values: it is not a decoder with a KV cache."
        )
    if "position_ids" in parameters:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in model.modules()]
    hooks += [m.register_forward_hook(leave, with_kwargs=True) for m in model.modules()]
    try:
        with torch.no_grad():
            model(**arguments, past_key_values=RecordingCache(config=model.config), use_cache=True)
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
    if not _is_causal(calls, length):
        raise InputError(f"{kind} is not causal: its attention masks let tokens see later ones; {remedy}")
    for key, call in calls.items():
        call.block = _enclosing_block(model, writers, key)
        call.repeated = key in repeated
    kept.append(calls)
    producers = {k: v for k, v in producers.items() if any(k == id(t) for t in _call_tensors(calls))}
    return calls, producers


def _embedding_device(model: nn.Module) -> torch.device:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise InputError(
            f"{type(model).__name__} has no token embeddings; transform() takes language models."
        )
    return weight.device


def _is_causal(calls: dict[int, Call], length: int) -> bool:
    """Whether no mask that attention modules received lets a token see a later one."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for tensor in _call_tensors(calls):
        if tensor.dim() == 4 and tensor.shape[-2:] == (length, length) and not tensor.is_complex():
            visible = tensor if tensor.dtype is torch.bool else tensor > torch.finfo(tensor.dtype).min / 2
            if bool(visible[..., later.to(tensor.device)].any()):
                return False
    return True


def _call_tensors(calls: dict[int, Call]) -> Iterator[Tensor]:
    for call in calls.values():
        yield from (t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor))


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

    def __init__(self, module: nn.Module, leaves: list[Any], spec: pytree.TreeSpec):
        super().__init__()
        self.module, self.leaves, self.spec = module, leaves, spec

    def forward(self, tensors: list[Tensor]) -> Any:
        it = iter(tensors)
        leaves = [next(it) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.module(*args, **kwargs)


def _capture_module(
    model: nn.Module,
    names: dict[nn.Module, str],
    call: Call,
    second: Call,
    producers: dict[int, Producer],
    layers: int,
) -> Capture:
    def is_cache(leaf: Any) -> bool:
        return isinstance(leaf, Cache)

    located, spec = pytree.tree_flatten_with_path((call.args, call.kwargs), is_leaf=is_cache)
    others = pytree.tree_leaves((second.args, second.kwargs), is_leaf=is_cache)
    leaves: list[Any] = []
    tensors: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    inputs: list[CapturedInput] = []
    cache_path: KeyPath = ()
    for (path, leaf), other in zip(located, others, strict=True):
        place = tuple(getattr(p, "key", getattr(p, "idx", None)) for p in path)
        if is_cache(leaf):
            cache_path, leaf = place, _MarkerCache(layers)
        if isinstance(leaf, Tensor):
            changed = (i for i in range(leaf.dim()) if leaf.shape[i] != other.shape[i])
            tensors.append(leaf)
            shapes.append(dict.fromkeys(changed, torch.export.Dim.AUTO))
            inputs.append(CapturedInput("", place, leaf, producers.get(id(leaf))))
        leaves.append(leaf)

    def export(marked: bool) -> tuple[torch.export.ExportedProgram, AttentionArguments | None]:
        config = getattr(call.module, "config", model.config)
        with _markers(config, marked) as arguments, torch.no_grad():
            program = torch.export.export(
                _Wrapped(call.module, leaves, spec), (tensors,), dynamic_shapes=(shapes,), strict=False
            )
        if arguments and config._attn_implementation == "sdpa":
            # transformers' SDPA knows no soft-cap: 5.17 drops one (gemma2), later versions refuse it
            arguments[-1].static.pop("softcap", None)
        return program, arguments[-1] if arguments else None

    program, arguments = export(marked=True)
    calls_marker = any(n.target is torch.ops.rotatekv_capture.attention.default for n in program.graph.nodes)
    if not calls_marker or (arguments is not None and not understood(arguments)):
        # The module does not use the attention interface, or in a way that attend() does not cover. A foreign
        # implementation name may also have changed its branches (falcon): capture its own arithmetic.
        program, arguments = export(marked=False)
    graph, constants = _module_rooted(program, inputs)
    return Capture(
        name=names[call.module],
        module=call.module,
        block_name=names[call.block],
        layer_index=call.layer_index,
        graph=graph,
        inputs=inputs,
        cache_path=cache_path,
        constants=constants,
        arguments=arguments,
        key_shape=call.key_shape,
        value_shape=call.value_shape,
    )


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

    def constant(name: str, tensor: Tensor) -> fx.Node:
        flat = "constant_" + name.replace(".", "_")
        constants[flat] = tensor.detach().clone()
        return graph.get_attr(f"{RUNTIME_NAME}.{flat}")

    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            target = lifted[node.name]
            if target in program.state_dict:
                env[node] = graph.get_attr(target.removeprefix("module."))
            else:
                env[node] = constant(target, program.constants[target])
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
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
        if node in env:
            env[node].meta = dict(node.meta)
    return graph, constants
