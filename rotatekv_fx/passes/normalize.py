"""normalize: one spelling for what captures spell in several ways, before anything is matched.

    matmul(x, t(W))                     ->  linear(x, W)
    sdpa(q, k_cached, v_cached, mask)   ->  transpose(attention(q, k_cached, v_cached, mask))
    dropout(x, p, train=False)          ->  x
    to(x, the device of x)              ->  x
    view(x, size)                       ->  reshape(x, size)
    sym_size(cos, 1)                    ->  sym_size(hidden_states, 1)

Strides of what the packed cache returns need not be those that were captured.

Sizes are read from hidden states alone: positional rows may come with batch 1 at run time.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rotatekv_fx.capture import AttentionArguments, Capture
from rotatekv_fx.sites import ATTENTION, KV_UPDATE

aten = torch.ops.aten
_NO_EFFECT = frozenset(
    {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range.default}
)
_IDENTITY = frozenset(
    {aten.alias.default, aten.detach.default, aten.detach_.default, aten.contiguous.default}
)


def normalize(capture: Capture) -> dict[str, int]:
    """Rewrite the captured graph to the normal spelling.

    Returns:
        How many nodes of each kind were rewritten.
    """
    counts = {
        "removed": _remove_without_effect(capture.graph),
        "linear": _matmul_to_linear(capture.graph),
        "attention": _sdpa_to_attention(capture),
        "reshape": _view_to_reshape(capture.graph),
        "sizes": _sizes_from_hidden(capture.graph),
    }
    capture.graph.eliminate_dead_code()
    capture.graph.lint()
    return counts


def _replace(node: fx.Node, new: Any) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _remove_without_effect(graph: fx.Graph) -> int:
    removed = 0
    for node in list(graph.nodes):
        if node.target in _NO_EFFECT and not node.users:
            graph.erase_node(node)
        elif (
            node.target in _IDENTITY
            or (node.target is aten.dropout.default and not (node.args[1] and node.args[2]))
            or _moves_nothing(node)
        ):
            _replace(node, node.args[0])
        else:
            continue
        removed += 1
    return removed


def _moves_nothing(node: fx.Node) -> bool:
    """Whether this takes a tensor to where it is, as the hooks of accelerate do with every input; an input
    may be None in other calls.
    """
    if node.target is not aten.to.dtype_layout:
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)


def _transposed(node: Any) -> Any:
    """W if `node` is W transposed, else None."""
    if not isinstance(node, fx.Node):
        return None
    swaps = node.target is aten.transpose.int and {a % 2 for a in node.args[1:]} == {0, 1}
    permutes = node.target is aten.permute.default and list(node.args[1]) == [1, 0]
    if node.target in (aten.t.default, aten.numpy_T.default) or swaps or permutes:
        return node.args[0]
    return None


def _matmul_to_linear(graph: fx.Graph) -> int:
    rewritten = 0
    for node in graph.find_nodes(op="call_function", target=aten.matmul.default):
        weight = _transposed(node.args[1])
        if weight is not None and weight.op == "get_attr" and weight.meta["val"].dim() == 2:
            with graph.inserting_before(node):
                linear = graph.call_function(aten.linear.default, (node.args[0], weight))
            linear.meta = dict(node.meta)
            _replace(node, linear)
            rewritten += 1
    return rewritten


def _sdpa_to_attention(capture: Capture) -> int:
    """An inline SDPA over the cached key and value themselves becomes the attention marker."""
    graph = capture.graph
    nodes = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    if len(nodes) != 1 or capture.arguments is not None:
        return 0
    (node,) = nodes
    query, key, value, *rest = node.args
    options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)), **node.kwargs}
    if any(n.target is not operator.getitem or n.args[0].target is not KV_UPDATE for n in (key, value)):
        return 0
    scale = options.get("scale")
    capture.arguments = AttentionArguments(
        {"scaling": scale if scale is not None else capture.key_shape[3] ** -0.5}, ()
    )
    with graph.inserting_before(node):
        marker = graph.call_function(ATTENTION, (query, key, value, options.get("attn_mask"), []))
        heads_first = graph.call_function(aten.transpose.int, (marker, 1, 2))
    marker.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2)}
    heads_first.meta = dict(node.meta)
    _replace(node, heads_first)
    return 1


def _view_to_reshape(graph: fx.Graph) -> int:
    views = graph.find_nodes(op="call_function", target=aten.view.default)
    for node in views:
        node.target = aten.reshape.default
    return len(views)


def _sizes_from_hidden(graph: fx.Graph) -> int:
    hidden = _hidden_states(graph)
    if hidden is None:
        return 0
    axes = {str(s): axis for axis, s in enumerate(hidden.meta["val"].shape) if not isinstance(s, int)}
    rewritten = 0
    with graph.inserting_after(hidden):
        sizes = {name: graph.call_function(aten.sym_size.int, (hidden, axis)) for name, axis in axes.items()}
    for name, size in sizes.items():
        size.meta["val"] = hidden.meta["val"].shape[axes[name]]
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        name = str(node.meta["val"])
        if name in sizes and node not in sizes.values():
            _replace(node, sizes[name])
            rewritten += 1
    return rewritten


def _hidden_states(graph: fx.Graph) -> fx.Node | None:
    """The floating-point input that the cached value is computed from."""
    writes = graph.find_nodes(op="call_function", target=KV_UPDATE)
    pending = [writes[0].args[1]] if writes else []
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop(0)
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point():
            return node
        inputs = [
            n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple | list)
        ]
        pending += [n for n in inputs if n not in seen]
        seen |= set(inputs)
    return None
