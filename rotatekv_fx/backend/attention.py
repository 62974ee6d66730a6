"""The attention of an aten graph, whether one call or spelled out, and the marker ops in its place.

    matmul(query, key^T) -> * scale -> soft-cap -> + mask -> softmax (with sink logits) -> matmul(., value)

Heads that are repeated for grouped queries are followed back to the key and value themselves.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from rotatekv_fx.capture import AttentionArguments
from rotatekv_fx.sites import ATTENTION, KV_UPDATE

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.contiguous.default})
_REPEATS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default),
        *(aten.contiguous.default, aten.alias.default, aten.expand.default),
    }
)


class NotUnderstood(Exception):
    """The attention is spelled in a way that is not read; `node` is where reading stopped."""

    def __init__(self, reason: str, node: fx.Node | None = None):
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclasses.dataclass(frozen=True)
class _Found:
    """One attention: `result` [B, Hq, S, Dv] of query [B, Hq, S, D] and repeated keys and values."""

    result: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    static: dict[str, Any]
    sink_logits: fx.Node | None = None


def mark_attention(graph: fx.Graph) -> tuple[AttentionArguments, tuple[int, ...], tuple[int, ...]]:
    """Put `kv_update` and `attention` markers in the place of the graph's one attention.

    Returns:
        What the attention is given besides query, key, value and mask, and the shapes of key and value.

    Raises:
        NotUnderstood: there is not one attention, or its arithmetic is another.
    """
    calls = graph.find_nodes(op="call_function", target=_SDPA)
    softmaxes = [n for n in graph.nodes if n.target in _SOFTMAX and n.meta["val"].dim() == 4]
    if len(calls) + len(softmaxes) != 1:
        raise NotUnderstood(f"{len(calls) + len(softmaxes)} attentions in one module, expected 1")
    found = _read_call(calls[0]) if calls else _read_spelled(softmaxes[0])
    key, value = _before_repeat(found.key), _before_repeat(found.value)
    shapes = tuple(key.meta["val"].shape), tuple(value.meta["val"].shape)
    heads = found.query.meta["val"].shape[1]
    if len(shapes[0]) != 4 or heads % shapes[0][1]:
        raise NotUnderstood(f"{heads} query heads for keys of shape {list(shapes[0])}", found.result)
    node, extra = found.result, [] if found.sink_logits is None else [found.sink_logits]
    with graph.inserting_before(node):
        write = graph.call_function(KV_UPDATE, (key, value))
        cached = [graph.call_function(operator.getitem, (write, i)) for i in range(2)]
        marker = graph.call_function(ATTENTION, (found.query, *cached, found.mask, extra))
        heads_first = graph.call_function(aten.transpose.int, (marker, 1, 2))
    write.meta["val"] = (key.meta["val"], value.meta["val"])
    cached[0].meta["val"], cached[1].meta["val"] = write.meta["val"]
    marker.meta["val"] = node.meta["val"].transpose(1, 2)
    heads_first.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(heads_first)
    graph.erase_node(node)
    graph.eliminate_dead_code()
    return AttentionArguments(found.static, ("s_aux",) if extra else ()), *shapes


def _read_call(node: fx.Node) -> _Found:
    """scaled_dot_product_attention."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("dropout_p"):
        raise NotUnderstood(f"attention with dropout {given['dropout_p']}; call model.eval()", node)
    scale = _number(given.get("scale"))
    static = {
        "scaling": given["query"].meta["val"].shape[-1] ** -0.5 if scale is None else scale,
        "is_causal": bool(given.get("is_causal", False)),
    }
    return _Found(node, given["query"], given["key"], given["value"], given.get("attn_mask"), static)


def _read_spelled(softmax: fx.Node) -> _Found:
    """Matrix products around a softmax."""
    result = softmax
    while result.target is not aten.matmul.default:
        users = list(result.users)
        if len(users) != 1 or (result is not softmax and not _passes_on(result)):
            raise NotUnderstood("the softmax does not go to one matrix product", result)
        result = users[0]
    node, sink_logits, static = softmax.args[0], None, {"scaling": 1.0, "is_causal": False}
    node = _past_casts(node)
    if node.target is aten.sub.Tensor and "max" in str(_origin(node.args[1]).target):
        node = node.args[0]  # which a softmax does by itself
    if node.target is aten.cat.default:
        (node, sink_logits) = node.args[0]
        sink_logits = _past(sink_logits, _REPEATS | _CASTS)
        if sink_logits.meta["val"].dim() != 1:
            raise NotUnderstood("the softmax has columns that are not one logit a head", sink_logits)
    node, mask = _past_casts(node), None
    if node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node):
        node, mask = node.args
    node = _past_casts(node)
    node, cap = _scaled(node)
    if node.target is aten.tanh.default:
        node, inverse = _scaled(node.args[0])
        if abs(cap * inverse - 1.0) > 1e-6:
            raise NotUnderstood(f"a soft-cap that divides by {1 / inverse:g} and multiplies by {cap:g}", node)
        static["softcap"] = cap
        node, cap = _scaled(node)
    static["scaling"] = cap
    if node.target is not aten.matmul.default:
        raise NotUnderstood("the scores are no scaled product of queries and keys", node)
    query, transposed = node.args
    swapped = transposed.target is aten.transpose.int and {a % 4 for a in transposed.args[1:]} == {2, 3}
    if not swapped:
        raise NotUnderstood("the keys are not transposed for the scores", transposed)
    return _Found(result, query, transposed.args[0], result.args[1], mask, static, sink_logits)


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """x and c of a node that is c * x or x / (1 / c); c is 1 for any other."""
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        factor = _number(node.args[1])
        if factor is not None:
            return _past_casts(node.args[0]), factor if node.target is aten.mul.Tensor else 1.0 / factor
    return node, 1.0


def _number(value: Any) -> float | None:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
        value = None if isinstance(value, Tensor) else value
    return None if value is None else float(value)


def _passes_on(node: fx.Node) -> bool:
    """Whether a node between softmax and values only casts, does not drop out, or cuts off sinks' column."""
    dropout = node.target is aten.dropout.default and not (node.args[1] and node.args[2])
    return dropout or node.target in _CASTS or node.target in (aten.slice.Tensor, aten.alias.default)


def _past(node: fx.Node, targets: frozenset[Any]) -> fx.Node:
    while node.target in targets:
        node = node.args[0]
    return node


def _past_casts(node: fx.Node) -> fx.Node:
    return _past(node, _CASTS)


def _origin(node: Any) -> fx.Node:
    return node.args[0] if node.target is operator.getitem else node


def _before_repeat(node: fx.Node) -> fx.Node:
    """The tensor [B, Hkv, S, D] whose heads `node` [B, Hq, S, D] repeats side by side, or `node` itself."""
    expanded, source = False, node
    while source.target in _REPEATS or _keeps_all(source):
        expanded |= source.target is aten.expand.default
        source = source.args[0]
    if source.target is aten.repeat_interleave.self_int and source.args[2] in (1, -3):
        return source.args[0]
    if not expanded or source.target is not aten.unsqueeze.default or source.args[1] not in (2, -3):
        return node
    source = source.args[0]
    while _keeps_all(source):
        source = source.args[0]
    return source


def _keeps_all(node: fx.Node) -> bool:
    """Whether a node is a slice that leaves nothing out."""
    whole = torch.iinfo(torch.int64).max
    return node.target is aten.slice.Tensor and node.args[2] == 0 and node.args[3] == whole
