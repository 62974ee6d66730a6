"""A whole-model Dynamo graph -> one captured graph per attention module, in the form that `capture` gives.

Every node of a Dynamo graph names the modules that were being called when it was traced. The attention module
is the innermost one around the attention, and the block is the outermost member of a numbered list around
that. The module's nodes are traced again by themselves, to aten, and the two marker ops put in:

    before:  key -> repeat heads -> scaled_dot_product_attention(query, ., ., mask)
             value -> repeat heads ---------------------------------^

    after:   key, value -> kv_update -> attention(query, ., ., mask) -> transpose
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rotatekv_fx.backend.attention import NotUnderstood, mark_attention
from rotatekv_fx.capture import RUNTIME_NAME, Capture, CapturedInput
from rotatekv_fx.sites import Rejection

PARAMETERS = "parameters"  # where a captured graph reads the whole graph's parameters
# The attentions that are read: one call, or a softmax between matrix products.
_READ = frozenset({F.scaled_dot_product_attention, F.softmax, torch.softmax, "softmax"})
OWN_CACHE = "its keys and values go through a cache of transformers"


@dataclasses.dataclass(frozen=True)
class Region:
    """One attention module's part of a Dynamo graph.

    Attributes:
        capture: its graph, captured; `capture.module` is None, a backend never sees modules.
        nodes: the part itself, in order.
        sources: the nodes of the whole graph behind the captured graph's placeholders and parameters, by
            name.
        outputs: nodes of the part that others read; the captured graph returns them in this order.
        block: nodes of the block that encloses the module.
    """

    capture: Capture
    nodes: list[fx.Node]
    sources: dict[str, fx.Node]
    outputs: list[fx.Node]
    block: frozenset[fx.Node]


def find_regions(graph_module: fx.GraphModule) -> tuple[list[Region], list[Rejection]]:
    """Every attention module of a Dynamo graph, captured; the graph is left as it is.

    Returns:
        The regions, and for every other attention a rejection with its reason and node.
    """
    regions, rejections = [], []
    anchors = [n for n in graph_module.graph.nodes if n.op.startswith("call_") and _attends(n)]
    for number, anchor in enumerate(anchors):
        name, index = anchor.name, number
        try:
            if anchor.target not in _READ:
                raise NotUnderstood(f"an attention of another kind, {_spelled(anchor)}", anchor)
            key, name = _innermost(anchor)
            index, block = _block(anchor, name)
            regions.append(_region(graph_module, anchor, (key, name), index, block))
        except NotUnderstood as no:
            rejections.append(Rejection(name, index, no.reason, (no.node or anchor).name))
    return regions, rejections


def _attends(node: fx.Node) -> bool:
    """Whether a node is an attention, or the softmax of one that is spelled out."""
    if "softmax" in _spelled(node):
        return isinstance(_value(node), Tensor) and _value(node).dim() == 4
    return "attention" in _spelled(node) or "flash_attn" in _spelled(node)


def _spelled(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _stack(node: fx.Node) -> dict[str, str]:
    """The modules around a node, outermost first: a key, and the path below the compiled module."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: re.sub(r"^L(\[[^\]]*\])*\.?", "", path) for key, (path, _) in stack.items()}


def _innermost(node: fx.Node) -> tuple[str, str]:
    stack = _stack(node)
    if not stack:
        raise NotUnderstood("the attention was traced outside of any module", node)
    return list(stack.items())[-1]


def _block(anchor: fx.Node, name: str) -> tuple[int, frozenset[fx.Node]]:
    for key, path in _stack(anchor).items():
        last = path.rpartition(".")[2]
        if last.isdecimal():
            return int(last), frozenset(n for n in anchor.graph.nodes if key in _stack(n))
    raise NotUnderstood(f"no numbered block encloses {name}", anchor)


def _region(
    owner: fx.GraphModule, anchor: fx.Node, module: tuple[str, str], index: int, block: frozenset[fx.Node]
) -> Region:
    key, name = module
    nodes = _nodes_of(anchor.graph, key)
    own = set(nodes)
    if any(n is not anchor and _attends(n) for n in nodes):
        raise NotUnderstood("several attentions in one module, expected 1", anchor)
    outputs = [n for n in nodes if any(u not in own for u in n.users)]
    if not outputs:
        raise NotUnderstood("nothing reads what its module returns", anchor)
    external = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in own))
    _refuse_own_cache(anchor, own, outputs)
    parameters = [n for n in external if _is_parameter(n)]
    inputs = [n for n in external if n not in parameters]
    try:
        graph, constants = _traced(owner, nodes, inputs, parameters, outputs)
    except Exception as error:  # tracing raises many kinds; all mean "cannot be traced"
        message = str(error).strip().partition("\n")[0] or "no message"
        raise NotUnderstood(f"tracing failed: {type(error).__name__}: {message}", anchor) from error
    arguments, key_shape, value_shape = mark_attention(graph)
    capture = Capture(
        name=name,
        module=None,  # type: ignore[arg-type]
        block_name="",
        layer_index=index,
        graph=graph,
        inputs=[CapturedInput(n.name, (), _value(n), None) for n in inputs if isinstance(_value(n), Tensor)],
        cache_path=(),
        constants=constants,
        arguments=arguments,
        key_shape=key_shape,
        value_shape=value_shape,
        fixed_sizes=True,
    )
    return Region(capture, nodes, {n.name: n for n in external}, outputs, block)


def _nodes_of(graph: fx.Graph, key: str) -> list[fx.Node]:
    """Nodes traced inside a module; a number that is computed from nothing inside stays outside."""
    nodes: list[fx.Node] = []
    own: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or key not in _stack(node):
            continue
        number = isinstance(_value(node), torch.SymInt | torch.SymFloat | int | float)
        if number and not any(i in own for i in node.all_input_nodes):
            continue
        own.add(node)
        nodes.append(node)
    return nodes


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def fake_mode(nodes: Iterable[fx.Node]) -> FakeTensorMode:
    """The mode that Dynamo traced these nodes in; the one of its current context is another."""
    return next(v.fake_mode for v in map(_value, nodes) if isinstance(v, FakeTensor))


def _is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the compiled module."""
    marked = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return node.op == "placeholder" and (
        isinstance(_value(node), torch.nn.Parameter) or marked == "unguarded"
    )


def _refuse_own_cache(anchor: fx.Node, own: set[fx.Node], outputs: list[fx.Node]) -> None:
    """A cache shows as keys and values that leave the module, or as one that the values come from."""
    after, before = _closure([anchor], "users", own), _closure(_values(anchor, own), "all_input_nodes", own)
    leaving = (n for n in outputs if n not in after)
    entering = (n for n in before if n not in own and not _is_parameter(n))
    for node in (*leaving, *entering):
        if isinstance(_value(node), Tensor) and _value(node).dim() == 4:
            raise NotUnderstood(OWN_CACHE, node)


def _values(anchor: fx.Node, own: set[fx.Node]) -> list[fx.Node]:
    """What the attention weights are multiplied with."""
    if anchor.target is F.scaled_dot_product_attention:
        return [anchor.args[2]] if len(anchor.args) > 2 else [anchor.kwargs["value"]]
    reached = _closure([anchor], "users", own) - {anchor}
    return [n.args[1] for n in reached if _spelled(n) == "matmul"]


def _closure(start: list[fx.Node], edges: str, within: set[fx.Node]) -> set[fx.Node]:
    """What is reached from `start` along edges, the first nodes outside of `within` included."""
    reached: set[fx.Node] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += list(getattr(node, edges)) if node in within else []
    return reached


def _traced(
    owner: fx.GraphModule,
    nodes: list[fx.Node],
    inputs: list[fx.Node],
    parameters: list[fx.Node],
    outputs: list[fx.Node],
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The nodes as an aten graph of their inputs, in which parameters and constants are attributes."""
    part, env = fx.Graph(), {}
    numbers = {n for n in inputs if isinstance(_value(n), int | float)}
    given = [n for n in (*inputs, *parameters) if n not in numbers]
    for node in given:
        env[node] = part.placeholder(node.name)
    for node in nodes:
        env[node] = part.node_copy(node, lambda n: _value(n) if n in numbers else env[n])
    part.output(tuple(env[n] for n in outputs))
    examples = [_value(n) for n in given]
    with torch.no_grad(), fake_mode(given):
        traced = make_fx(fx.GraphModule(owner, part), pre_dispatch=True)(*examples)
    graph, env, constants = fx.Graph(), {}, {}
    names = iter(given)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            source = next(names)
            parameter = source in parameters
            attribute = f"{PARAMETERS}.{source.name}"
            env[node] = graph.get_attr(attribute) if parameter else graph.placeholder(source.name)
        elif node.op == "get_attr":
            constants[name := f"constant_{node.target}"] = getattr(traced, str(node.target))
            env[node] = graph.get_attr(f"{RUNTIME_NAME}.{name}")
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {k: v for k, v in node.meta.items() if k == "val"}
    return graph, constants
