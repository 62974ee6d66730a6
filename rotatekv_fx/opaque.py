"""Submodules of an attention module that a graph calls as they are, instead of reading their weights.

A projection whose weights are quantized, spread over several processes, or brought to the device by a hook
cannot be traced into `aten.linear`. While its attention module is exported, a stub with the same interface
stands in its place; the graph then holds

    k_proj = get_attr[k_proj];  y = call_submodule(k_proj, x)

and whatever the submodule does (unpacking, collectives, hooks) happens when it is called. Rotations are not
merged into it: `rotate` nodes take their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn


@torch.library.custom_op("rotatekv_capture::submodule", mutates_args=())
def submodule(x: Tensor, name: str, features: int, dtype: torch.dtype) -> Tensor:
    """Stands for a call of a submodule: [..., C] -> [..., features]. Only ever traced."""
    return x.new_zeros(*x.shape[:-1], features, dtype=dtype)


@submodule.register_fake
def _(x: Tensor, name: str, features: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], features, dtype=dtype)


SUBMODULE = torch.ops.rotatekv_capture.submodule.default


def call_submodule(module: nn.Module, x: Tensor) -> Tensor:
    """What the marker becomes in a captured graph."""
    return module(x)


class _Stub(nn.Module):
    """Stands in for a submodule while its parent is exported."""

    def __init__(self, original: nn.Module, name: str, output: Tensor):
        super().__init__()
        vars(self)["original"] = original  # not as a child, whose parameters the export would lift
        self.name, self.features, self.dtype = name, output.shape[-1], output.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["original"], name)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rotatekv_capture.submodule(x, self.name, self.features, self.dtype)


def why_opaque(module: nn.Module) -> str | None:
    """Why a submodule without children must be called as it is, or None where it need not."""
    weighs = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    if not weighs or next(module.children(), None) is not None:
        return None
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter:
            return f"weights of type {type(parameter).__name__}"
        if not is_plain(parameter):
            return f"weights of {str(parameter.dtype).removeprefix('torch.')}"
    own = vars(module)
    hook = own.get("_hf_hook")
    if "forward" in own and (hook is None or getattr(hook, "offload", True)):  # others move inputs only
        return "a forward of its own"
    return "hooks" if module._forward_hooks or module._forward_pre_hooks else None


def is_plain(parameter: Tensor) -> bool:
    """Whether a parameter holds its numbers themselves: no subclass, and 16 bits or more."""
    wide = parameter.is_floating_point() and parameter.dtype.itemsize > 1
    return type(parameter) is nn.Parameter and wide


@contextlib.contextmanager
def stubbed(module: nn.Module, outputs: Mapping[int, Tensor]) -> Iterator[None]:
    """Put stubs in the places of opaque submodules while `module` is exported.

    Args:
        module: the attention module.
        outputs: what each submodule returned while calls were recorded, by id.
    """
    places = [
        (parent, name, child, f"{prefix}.{name}".lstrip("."))
        for prefix, parent in module.named_modules()
        for name, child in parent.named_children()
        if id(child) in outputs and why_opaque(child)
    ]
    try:
        for parent, name, child, path in places:
            parent._modules[name] = _Stub(child, path, outputs[id(child)])
        yield
    finally:
        for parent, name, child, _ in places:
            parent._modules[name] = child


def call_as_they_are(graph: fx.Graph) -> None:
    """Replace the markers of a captured graph by calls."""
    for node in graph.find_nodes(op="call_function", target=SUBMODULE):
        with graph.inserting_before(node):
            module = graph.get_attr(node.args[1])
            call = graph.call_function(call_submodule, (module, node.args[0]))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def numbers(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter as an ordinary tensor: a part, dequantized, or packed."""
    tensor = parameter.detach()
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    if type(parameter) in (Tensor, nn.Parameter):
        return tensor
    return tensor.dequantize() if tensor.is_floating_point() else tensor.as_subclass(Tensor)


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter as `numbers` gives it, also of one that is spread over processes; these then enter
    together.
    """
    tensor = parameter.detach()
    return numbers(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def dense(tensor: Tensor) -> Tensor | None:
    """What `numbers` or `whole` gave of a weight, or None if these are not the weight's own numbers."""
    wide = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # 8-bit numbers have scales beside them
    return tensor if wide and tensor.device.type != "meta" else None
