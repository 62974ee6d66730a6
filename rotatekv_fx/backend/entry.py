"""The function that the entry point "rotatekv" names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from rotatekv_fx import ops  # noqa: F401 (declares the ops that a cached graph may call)
from rotatekv_fx.backend.insert import BUFFER, holds_our_ops, insert
from rotatekv_fx.backend.options import read_options


def rotatekv(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: our passes where the model is untransformed, then inductor.

    The graph of a transformed model holds our ops already, and inductor compiles it as it is. In the graph of
    an untransformed model `insert` finds the attention sites and inserts rotate, quantize, dequantize and
    sink nodes. Both are for inference: our ops carry no gradient, so a graph that holds them runs under
    `no_grad`, and nothing can be trained through a part of it.

    Args:
        graph_module: the graph; changed in place.
        example_inputs: its inputs, fake.
        mode: a mode of `torch.compile`, such as "reduce-overhead".
        options: see `read_options`.

    Raises:
        ConfigError: an option is unknown or out of range, a recipe lacks its calibration, or settings are
            given for a transformed model. Dynamo wraps it in a BackendCompilerFailed.
        CalibrationError: the calibration file cannot be used.
    """
    from torch._inductor.compile_fx import compile_fx

    chosen = read_options(options, mode)
    insert(graph_module, chosen)
    trains = torch.is_grad_enabled() and not holds_our_ops(graph_module)
    module, constants = _lift_buffers(graph_module)
    fakes = detect_fake_mode(example_inputs)
    inputs = [*example_inputs, *(fakes.from_tensor(c, static_shapes=True) for c in constants)]
    key = f"{torch.compiler.config.cache_key_tag}rotatekv-{chosen.fingerprint()}"
    with torch.compiler.config.patch(cache_key_tag=key), torch.set_grad_enabled(trains):
        compiled = compile_fx(module, inputs, config_patches=dict(chosen.inductor))
    run = (lambda *args: compiled(*args, *constants)) if constants else compiled
    return run if trains or not torch.is_grad_enabled() else torch.no_grad()(run)


def _lift_buffers(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """A module whose inputs, behind the others, are the buffers that `insert` added; and those buffers.

    AOTAutograd refuses attributes that Dynamo did not make, and the values of inputs are no part of what
    inductor's cache keeps. Dynamo goes on reading the placeholders of its own graph, so this is a copy.
    """
    constants = {n: b for n, b in graph_module.named_buffers() if n.startswith(BUFFER)}
    if not constants:
        return graph_module, []
    graph, env, lifted = fx.Graph(), {}, {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
        env[node]._dynamo_source = node._dynamo_source
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in constants and name not in lifted:
            lifted[name] = graph.placeholder(name)
            # marked as Dynamo marks parameters: the address stays the same
            lifted[name].meta = {**node.meta, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
            lifted[name]._dynamo_source = None
    for node in graph_module.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name in constants:
            env[node] = lifted[name]
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    for name in constants:
        delattr(graph_module, name)
    module = fx.GraphModule(graph_module, graph)
    module.meta = graph_module.meta
    module._param_name_to_source = graph_module._param_name_to_source
    return module, [constants[name] for name in lifted]


def _reset() -> None:
    """What `torch._dynamo.reset` calls: forget recorded CUDA graphs, as it does for inductor."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


rotatekv.reset = _reset  # type: ignore[attr-defined]
