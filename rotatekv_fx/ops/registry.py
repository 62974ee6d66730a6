"""How an op of the namespace `rotatekv` is declared, checked, and given its implementations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rotatekv_fx.config import SUPPORTED_BITS
from rotatekv_fx.errors import ConfigError

# Op name -> "module:function" of the Triton kernel that CUDA tensors run; imported inside the first call.
TRITON_KERNELS: dict[str, str] = {
    "decode": "rotatekv_fx.kernels.attention.triton:decode",
    "decode_before_rope": "rotatekv_fx.kernels.attention.before_rope:decode_before_rope",
    "extend": "rotatekv_fx.kernels.quantize.triton:extend",
    "prefill": "rotatekv_fx.kernels.prefill.triton:prefill",
}

REFERENCES: dict[str, Callable[..., Any]] = {}
_GATHERERS: dict[str, Callable[..., tuple[Any, ...]]] = {}


def lowered_to(op_name: str, device_type: str) -> str:
    """What runs an op on a device: "triton" or "reference".

    Args:
        op_name: name without namespace, such as "rotate".
        device_type: `torch.device.type`, such as "cpu" or "cuda".

    Raises:
        ConfigError: there is no such op.
    """
    if op_name not in REFERENCES:
        raise ConfigError(f"there is no op {op_name!r}; use one of {sorted(REFERENCES)}.")
    kernels = device_type == "cuda" and torch.version.hip is None  # they hold PTX
    return "triton" if kernels and op_name in TRITON_KERNELS else "reference"


def implementation(op_name: str, device_type: str) -> Callable[..., Any]:
    if lowered_to(op_name, device_type) == "reference":
        return REFERENCES[op_name]
    module, _, name = TRITON_KERNELS[op_name].partition(":")
    function = getattr(importlib.import_module(module), name)
    return _on_the_device(_gathering(function, _GATHERERS.get(op_name)))


def _on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which is not that of the tensors in a model on several GPUs."""

    def run(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):
            return function(*args)

    return run


def _gathering(
    function: Callable[..., Any], gather: Callable[..., tuple[Any, ...]] | None
) -> Callable[..., Any]:
    return function if gather is None else lambda *args: function(*gather(*args))


def declare(
    signature: str,
    reference: Callable[..., Any],
    check: Callable[..., None],
    gather: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an op; the decorated function is its fake (shapes and dtypes only) and documents it.

    `check` sees the arguments before the fake and before every implementation; `gather`, where given, makes
    of them those that fake, check and implementations take.
    """
    name, _, arguments = signature.partition("(")
    qualified = f"rotatekv::{name}"

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked_fake(*args: Any) -> Any:
            _gathering(check, gather)(*args)
            return _gathering(fake, gather)(*args)

        def run_on(device_type: str) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                _gathering(check, gather)(*args)
                function = implementation(name, device_type)
                if torch.is_grad_enabled() or torch.is_autocast_enabled(device_type):
                    with torch.no_grad(), torch.autocast(device_type, enabled=False):
                        return function(*args)
                return function(*args)

            return run

        REFERENCES[name] = _gathering(reference, gather)
        if gather is not None:
            _GATHERERS[name] = gather
        torch.library.define(qualified, "(" + arguments)
        torch.library.register_fake(qualified, checked_fake)
        for device_type in ("cpu", "cuda"):
            torch.library.impl(qualified, device_type, run_on(device_type))
        return fake

    return register


def check_ranks(op: str, rank: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ConfigError(f"{op}: {name} has shape {list(tensor.shape)}; use {rank} dimensions.")


def check_equal(op: str, what: str, first: int, second: int, remedy: str) -> None:
    if first != second:
        raise ConfigError(f"{op}: the {what} are {first} and {second}; {remedy}.")


def check_int64(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise ConfigError(f"{op}: {name} is {tensor.dtype}; use torch.int64.")


def check_heads(op: str, x: Tensor, other: Tensor) -> None:
    check_equal(op, "heads of both tensors", x.shape[1], other.shape[1], "use the same heads")
    check_equal(op, "channels of both tensors", x.shape[3], other.shape[3], "use the same channels")


def check_code(op: str, bits: int, group: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ConfigError(f"{op}: bits is {bits}; use one of {SUPPORTED_BITS}.")
    if group < 1:
        raise ConfigError(f"{op}: group is {group}; use a whole number of at least 1.")
