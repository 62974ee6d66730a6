"""Putting a rewritten graph in the place of a module's forward, and taking it out again."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from rotatekv_fx.cache import AttentionRuntime
from rotatekv_fx.capture import RUNTIME_NAME, Capture, CapturedInput, lookup
from rotatekv_fx.errors import StateError

SUPPORTED_ATTENTION = ("sdpa", "eager")
MARK = "merged.mark"  # name below the runtime of what marks rotated weights in a state_dict


class Mark(nn.Module):
    """Puts a number in the state_dict beside weights that a rotation was merged into.

    An untransformed model refuses such a state_dict (an unexpected key), a transformed one refuses weights
    without the mark (a missing key) or with another's.
    """

    def __init__(self, number: int, device: torch.device):
        super().__init__()
        self.register_buffer("mark", torch.tensor(number, dtype=torch.int64, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}mark")
        if found is not None and int(found) != int(self.mark):
            args[-1].append(f"{prefix}mark: weights of a model that was transformed in another way")
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One module's replacement, complete before any module is touched.

    Attributes:
        graph: its placeholders are runtime, cache, the captured inputs, and the residual where sinks are
            kept.
        parameters: folded parameters by name, in the model's dtype.
        mark: tells one way of folding from another.
    """

    capture: Capture
    graph: fx.Graph
    runtime: AttentionRuntime
    parameters: dict[str, Tensor]
    inline_mask: CapturedInput | None  # the mask that inline attention reads
    mark: int


@dataclasses.dataclass(frozen=True)
class Original:
    """What `unbind` needs: names of the module and its block, and the replaced parameters on the CPU (or
    None).
    """

    name: str
    block_name: str
    parameters: dict[str, Tensor] | None
    forward: Any  # an instance's own forward (a wrapper put there by other libraries), else None


def bind(model: nn.Module, binding: Binding, keep_originals: bool) -> Original:
    """Rewrite one module of `model`; on an error it is left as it was."""
    capture, module = binding.capture, binding.capture.module
    replaced = {name: module.get_parameter(name) for name in binding.parameters}
    original = Original(
        capture.name,
        capture.block_name,
        {n: p.detach().to("cpu", copy=p.device.type != "cpu") for n, p in replaced.items()}
        if keep_originals
        else None,
        vars(module).get("forward"),
    )
    try:
        module.add_module(RUNTIME_NAME, binding.runtime)
        for tensor in replaced.values():
            binding.runtime.add_module("merged", Mark(binding.mark, tensor.device))
        function = type(fx.GraphModule(module, binding.graph)).forward
        for name, tensor in binding.parameters.items():
            _set_parameter(module, name, tensor, replaced[name].requires_grad)
        module.forward = types.MethodType(_forward(function, binding), module)
        if binding.runtime.spec.sinks:
            block = model.get_submodule(capture.block_name)
            block.register_forward_pre_hook(binding.runtime.observe, with_kwargs=True)
    except BaseException:
        _remove(model, original)
        for name, parameter in replaced.items():
            _set_parameter(module, name, parameter.detach(), parameter.requires_grad)
        raise
    return original


def unbind(model: nn.Module, original: Original) -> None:
    """Give a module its own forward and parameters back, in the dtype that the model has now."""
    module = model.get_submodule(original.name)
    _remove(model, original)
    for name, tensor in (original.parameters or {}).items():
        current = module.get_parameter(name)
        _set_parameter(module, name, tensor.to(current.device, current.dtype), current.requires_grad)


def _remove(model: nn.Module, original: Original) -> None:
    module, block = model.get_submodule(original.name), model.get_submodule(original.block_name)
    runtime = module._modules.pop(RUNTIME_NAME, None)
    vars(module).pop("forward", None)
    if original.forward is not None:
        module.forward = original.forward
    for key, hook in list(block._forward_pre_hooks.items()):
        if runtime is not None and getattr(hook, "__self__", None) is runtime:
            del block._forward_pre_hooks[key]
            block._forward_pre_hooks_with_kwargs.pop(key, None)


def _forward(function: Any, binding: Binding) -> Any:
    """A forward for any module with this graph; holds no module, so that a deep copy calls its own."""
    capture = binding.capture
    paths, cache_path = [i.path for i in capture.inputs], capture.cache_path
    hidden = next(i for i in capture.inputs if i.example.is_floating_point())
    hidden_path, dtype = hidden.path, hidden.example.dtype
    keeps_sinks = bool(binding.runtime.spec.sinks)
    mask = binding.inline_mask
    mask_at = -1 if mask is None else capture.inputs.index(mask)
    mask_dtype = None if mask is None else mask.example.dtype

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = lookup(args, kwargs, hidden_path)
        check_call(self, hidden, dtype)
        runtime, cache = self.rotatekv, lookup(args, kwargs, cache_path)
        inputs = [lookup(args, kwargs, path) for path in paths]
        if mask_at >= 0 and inputs[mask_at] is None:
            inputs[mask_at] = runtime.causal_mask(cache, hidden, mask_dtype)
        if keeps_sinks:
            inputs.append(runtime.take_residual(cache))
        return function(self, runtime, cache, *inputs)

    return forward


def check_call(module: nn.Module, hidden: Tensor, dtype: torch.dtype) -> None:
    """Refuse a call that the captured graph does not cover.

    Raises:
        StateError: the module is in training mode, or its dtype or the attention implementation has changed
            since transform().
    """
    if module.training:
        raise StateError(
            "a transformed model is for inference; call model.eval(), or restore(model) to train."
        )
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation not in SUPPORTED_ATTENTION:
        raise StateError(
            f"attention implementation {implementation!r} makes masks that packed layers cannot read; call "
            "model.set_attn_implementation('sdpa')."
        )
    if hidden.dtype is not dtype:
        raise StateError(
            f"the model was transformed in {dtype} and now runs in {hidden.dtype}; restore(model), "
            "convert it, and transform it again."
        )


def _set_parameter(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, nn.Parameter(tensor, requires_grad=requires_grad))
