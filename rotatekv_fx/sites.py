"""Find the attention site in a captured graph: reads the graph, never writes it.

The analysis follows tensors only (sizes would make everything depend on everything):

* the cache write names the key after RoPE and the value;
* hidden states are the one input that the value depends on;
* positional inputs are the other inputs that the key depends on;
* the pre-RoPE key is the last node that dominates the post-RoPE key, depends on no positional input and has
  the key's 4-D shape. What lies between is RoPE, whatever its spelling, and can be replayed.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rotatekv_fx.capture import Capture, CapturedInput, CaptureFailure
from rotatekv_fx.opaque import call_submodule, why_opaque

aten = torch.ops.aten
KV_UPDATE = torch.ops.rotatekv_capture.kv_update.default
HELD = torch.ops.rotatekv_capture.held.default
ATTENTION = torch.ops.rotatekv_capture.attention.default


@dataclasses.dataclass(frozen=True)
class Rejection:
    """An attention module that is not transformed, why, and the node that caused it."""

    name: str
    layer_index: int
    reason: str
    node: str = ""


@dataclasses.dataclass(frozen=True)
class Projection:
    """The linear layer whose output features reach a tensor through layout operations only.

    Attributes:
        node: the `aten.linear` node.
        weight, bias: names of its parameters on the attention module (`bias` may be None).
        features: int64 [H, D]: the output feature (or, for the output projection, the input feature) that
            each channel of each head is.
    """

    node: fx.Node
    weight: str
    bias: str | None
    features: Tensor


@dataclasses.dataclass(frozen=True)
class OpaqueOutput:
    """An output projection that is called as it is: its name, and `features` as in `Projection`."""

    module: str
    features: Tensor


@dataclasses.dataclass
class AttentionSite:
    """One attention module's graph with the places that the passes work on.

    Heads and channels: `kv_heads` x `head_dim` for keys, `value_dim` for values, `query_heads` query heads.
    `key_pre` is [B, Hkv, S, D], or [B, S, Hkv, D] where `key_pre_transposed`.
    `attention` is the attention node, or None when the module computes its attention inline; `mask` the
    attention mask [B, 1, S, N] that it receives, bool or additive.
    `unmerged`: why there is no projection of "key", "value" or "output" that a rotation can be merged into.
    """

    capture: Capture
    hidden: fx.Node
    key_pre: fx.Node
    key_pre_transposed: bool
    key_post: fx.Node
    value: fx.Node
    cache_write: fx.Node
    attention: fx.Node | None
    mask: fx.Node | None
    positional: list[CapturedInput]
    kv_heads: int
    query_heads: int
    head_dim: int
    value_dim: int
    key_projection: Projection | None
    value_projection: Projection | None
    output_projection: Projection | None
    opaque_output: OpaqueOutput | None = None
    unmerged: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.capture.name

    @property
    def layer_index(self) -> int:
        return self.capture.layer_index

    @property
    def graph(self) -> fx.Graph:
        return self.capture.graph

    @property
    def hidden_example(self) -> Tensor:
        """The hidden states [B, S, C] that the module was captured with."""
        return next(i.example for i in self.capture.inputs if i.name == self.hidden.name)

    @property
    def device(self) -> torch.device:
        """Where the module was captured."""
        return self.hidden_example.device

    def inline_input(self) -> fx.Node | None:
        """What enters inline scores with the cached keys besides queries, the mask and numbers: an ALiBi
        bias, say, or a table that is cut to the number of keys. Its columns are tokens in order.
        """
        if self.attention is not None:
            return None
        depends = _dependencies(self.graph)
        for node in self.graph.nodes:
            if "softmax" not in str(node.target) and "scaled_dot_product" not in str(node.target):
                continue
            mixed = [n for n in depends[node] if self.cache_write in depends[n]] + [node]
            for beside in (i for n in mixed for i in n.all_input_nodes if i not in mixed and _is_tensor(i)):
                sources = depends[beside] | {beside}
                if self.hidden in sources or self.cache_write in sources:
                    continue
                for source in sources - {self.mask}:
                    if not _tensor_inputs(source) and source.meta["val"].dim():
                        return source
        return None

    def rope_operations(self) -> list[str]:
        """Names of the operations between the pre-RoPE and the post-RoPE key."""
        return [_spelled(n) for n in rope_region(self) if n.op == "call_function"]


class _Reject(Exception):
    def __init__(self, reason: str, node: fx.Node | None = None):
        super().__init__(reason)
        self.reason, self.node = reason, node.name if node is not None else ""


def find_sites(captures: list[Capture | CaptureFailure]) -> tuple[list[AttentionSite], list[Rejection]]:
    """Locate the attention site of each captured graph (after `passes.normalize`).

    Returns:
        The sites, and for every other module a rejection with its reason and node.
    """
    sites, rejections = [], []
    for item in captures:
        try:
            if isinstance(item, CaptureFailure):
                raise _Reject(item.reason)
            sites.append(_find_site(item))
        except _Reject as no:
            rejections.append(Rejection(item.name, item.layer_index, no.reason, no.node))
    return sites, rejections


def _find_site(capture: Capture) -> AttentionSite:
    graph = capture.graph
    writes = graph.find_nodes(op="call_function", target=KV_UPDATE)
    if len(writes) != 1:
        raise _Reject(f"{len(writes)} cache writes in one module, expected 1", writes[-1] if writes else None)
    write = writes[0]
    key_post, value = write.args
    depends = _dependencies(graph)
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}

    if any(n.target is HELD for n in depends[key_post] | depends[value]):
        raise _Reject("what it caches depends on how many tokens the cache holds", write)
    carried = [placeholders[i.name] for i in capture.inputs if placeholders[i.name] in depends[value]]
    hidden_like = [n for n in carried if n.meta["val"].is_floating_point()]
    if len(hidden_like) != 1 or len(carried) != 1:
        names = ", ".join(n.name for n in carried) or "nothing"
        raise _Reject(
            f"the value depends on {names}; expected hidden states alone (a latent that keys share?)",
            value,
        )
    hidden = hidden_like[0]
    positional = [
        i
        for i in capture.inputs
        if placeholders[i.name] is not hidden and placeholders[i.name] in depends[key_post] | {key_post}
    ]
    positions = {placeholders[i.name] for i in positional}
    if len(capture.key_shape) != 4 or len(capture.value_shape) != 4:
        raise _Reject(f"cached keys have shape {list(capture.key_shape)}; expected 4 dimensions", key_post)
    if capture.key_shape[1] != capture.value_shape[1]:
        raise _Reject(
            f"keys have {capture.key_shape[1]} heads and values {capture.value_shape[1]}; expected equal",
            value,
        )

    key_pre, transposed = _find_pre_rope_key(graph, capture, depends, hidden, key_post, positions)
    attention = _attention_node(graph, write, capture)
    query_heads = (
        int(attention.args[0].meta["val"].shape[1]) if attention is not None else capture.key_shape[1]
    )
    kv_heads, head_dim, value_dim = capture.key_shape[1], capture.key_shape[3], capture.value_shape[3]
    output, opaque_output = _output_projection(capture, attention, query_heads, value_dim)
    site = AttentionSite(
        capture=capture,
        hidden=hidden,
        key_pre=key_pre,
        key_pre_transposed=transposed,
        key_post=key_post,
        value=value,
        cache_write=write,
        attention=attention,
        mask=_mask_node(placeholders, attention, hidden, positions),
        positional=positional,
        kv_heads=kv_heads,
        query_heads=query_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        key_projection=_input_projection(capture, key_pre, transposed, kv_heads, head_dim),
        value_projection=_input_projection(capture, value, False, kv_heads, value_dim),
        output_projection=output,
        opaque_output=opaque_output,
    )
    _say_what_is_in_the_way(site)
    return site


def _say_what_is_in_the_way(site: AttentionSite) -> None:
    """Note why rotations cannot be merged, for each side without a projection."""
    module = site.capture.module
    for side, target in (("key", site.key_pre), ("value", site.value)):
        if getattr(site, f"{side}_projection") is None:
            found = _layout_chain(target, lambda n: n.target not in LAYOUT_OPERATIONS)
            site.unmerged[side] = _obstacle(module, found[1] if found else target)
    if site.output_projection is None:
        node = site.attention
        while node is not None and len(node.users) == 1:
            node = next(iter(node.users))
            if node.target not in LAYOUT_OPERATIONS:
                break
        site.unmerged["output"] = "its attention is inline" if node is None else _obstacle(module, node)


def _obstacle(module: torch.nn.Module, node: fx.Node) -> str:
    """Why a rotation cannot pass this node."""
    if node.target is call_submodule:
        name = str(node.args[0].target)
        return f"{name} is called as it is ({why_opaque(module.get_submodule(name))})"
    if node.target is aten.linear.default:
        weight = node.args[1]
        computed = weight.op != "get_attr"
        return "its weights are computed" if computed else f"what {weight.target} gives has other readers"
    return f"{_spelled(node)} is in between"


def _attention_node(graph: fx.Graph, write: fx.Node, capture: Capture) -> fx.Node | None:
    nodes = graph.find_nodes(op="call_function", target=ATTENTION)
    if not nodes:
        return None
    if len(nodes) > 1:
        raise _Reject(f"{len(nodes)} attentions in one module, expected 1", nodes[-1])
    halves = [n.args[0] if n.target is operator.getitem else None for n in nodes[0].args[1:3]]
    if halves != [write, write]:
        raise _Reject("the attention does not read the cached key and value themselves", nodes[0])
    return nodes[0]


def _mask_node(
    placeholders: dict[str, fx.Node], attention: fx.Node | None, hidden: fx.Node, positions: set[fx.Node]
) -> fx.Node | None:
    """The mask of the attention node, or the one 4-D input that is neither hidden states nor positions."""
    if attention is not None:
        return attention.args[3]
    others = [n for n in placeholders.values() if n is not hidden and n not in positions]
    return next((n for n in others if n.meta["val"].dim() == 4), None)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _carries_tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if _carries_tensors(n)]


def _dependencies(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    depends: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        depends[node] = set()
        for source in _tensor_inputs(node):
            depends[node] |= depends[source] | {source}
    return depends


def _find_pre_rope_key(
    graph: fx.Graph,
    capture: Capture,
    depends: dict[fx.Node, set[fx.Node]],
    hidden: fx.Node,
    key_post: fx.Node,
    positions: set[fx.Node],
) -> tuple[fx.Node, bool]:
    path = [n for n in graph.nodes if _carries_tensors(n) and (n is key_post or n in depends[key_post])]
    wanted = (capture.key_shape[1], capture.key_shape[3])
    tokens = _static(hidden.meta["val"].shape[1]) if capture.fixed_sizes else None

    def is_tokens(size: Any) -> bool:
        return _static(size) == tokens

    def layout(node: fx.Node) -> str | None:
        if not _is_tensor(node) or node.meta["val"].dim() != 4:
            return None
        _, one, two, last = node.meta["val"].shape
        if tokens == wanted[0] and (_static(one), _static(two), _static(last)) == (tokens, *wanted):
            return {True: "bhsd", False: "bshd", None: None}[_axes_swapped(node)]
        if (_static(one), _static(last)) == wanted and is_tokens(two):
            return "bhsd"
        if (_static(two), _static(last)) == wanted and is_tokens(one):
            return "bshd"
        return None

    def dominates(node: fx.Node) -> bool:
        reached = {hidden}
        for other in path:
            if other is not node and any(i in reached for i in _tensor_inputs(other)):
                reached.add(other)
        return key_post not in reached

    last_dominator = None
    for node in reversed(path):
        if node is hidden or node in positions or depends[node] & positions or hidden not in depends[node]:
            continue
        if node is not key_post and not dominates(node):
            continue
        last_dominator = last_dominator or node
        if found := layout(node):
            return node, found == "bshd"
    raise _Reject(
        "no pre-RoPE key: nothing of the key's shape "
        f"[B, {wanted[0]}, S, {wanted[1]}] lies before the positions enter (a latent or shared key?)",
        last_dominator,
    )


def _axes_swapped(node: fx.Node) -> bool | None:
    """Whether axes 1 and 2 of a 4-D tensor changed places since it was made of a [B, S, C] one; None if
    unknown.
    """
    swapped = False
    while not _is_tensor(node) or node.meta["val"].dim() > 3:
        swaps = node.target is aten.transpose.int and {a % 4 for a in node.args[1:]} == {1, 2}
        permutes = node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1, 3]
        swapped ^= swaps or permutes
        sources = [n for n in _tensor_inputs(node) if n.op == "call_function"]
        if not sources:
            return None
        node = sources[0]
    return swapped


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def rope_region(site: AttentionSite) -> list[fx.Node]:
    """The nodes from the pre-RoPE key and the positional inputs to the post-RoPE key, in order."""
    needed: set[fx.Node] = set()
    pending = [site.key_post]
    while pending:
        node = pending.pop()
        if node in needed or node is site.key_pre or node.op == "placeholder":
            continue
        needed.add(node)
        pending += node.all_input_nodes
    return [n for n in site.graph.nodes if n in needed]


def replay(graph: fx.Graph, region: list[fx.Node], env: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copy `region` to the graph's insertion point, its inputs replaced by `env`; sizes come from the new
    inputs.

    Returns:
        `env` extended by the copies.
    """
    env = dict(env)
    for node in region:
        env[node] = _remapped_size(graph, node, env) or graph.node_copy(node, lambda n: env.get(n, n))
        env[node].meta = dict(node.meta)
    return env


def _remapped_size(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A size of something outside the region becomes the same symbol's size of a replaced input."""
    if node.target is not aten.sym_size.int:
        return None
    for old, new in env.items():
        if not _is_tensor(old):
            continue
        for axis, size in enumerate(old.meta["val"].shape):
            if not isinstance(size, int) and str(size) == str(node.meta["val"]):
                return graph.call_function(aten.sym_size.int, (new, axis))
    return None


# Operations that move channels without mixing them.
LAYOUT_OPERATIONS: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.index.Tensor,
        aten.index_select.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
        operator.getitem,
    }
)
# A change of dtype moves nothing either, and indices are sent past it unchanged.
CASTS: frozenset[Any] = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout})
LAYOUT_OPERATIONS |= CASTS
_TOKENS = (1, 1)  # batch and sequence of the index tensor that is sent through layout operations


def _layout_chain(target: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], fx.Node] | None:
    """Layout operations from the first node that `stop` accepts up to `target`, and that node; None if others
    mix in.
    """
    chain: list[fx.Node] = []
    node = target
    while not stop(node):
        if node.target not in LAYOUT_OPERATIONS or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        chain.append(node)
        node = node.args[0]
    return chain[::-1], node


def _send_indices(
    chain: list[fx.Node], source: fx.Node, indices: Tensor, constants: dict[str, Tensor]
) -> Tensor | None:
    """Run layout operations on indices, with every dynamic size 1; tells which channel lands where."""
    env: dict[fx.Node, Any] = {source: indices}

    def concrete(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        if arg in env:
            return env[arg]
        if arg.op == "get_attr":
            return constants[str(arg.target).rpartition(".")[2]]
        if arg.target in LAYOUT_OPERATIONS:
            env[arg] = run(arg)
            return env[arg]
        if isinstance(arg.meta.get("val"), torch.SymInt):
            return 1
        raise KeyError(arg.name)

    def run(node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete)
        return args[0] if node.target in CASTS else node.target(*args, **kwargs)

    try:
        for node in chain:
            env[node] = run(node)
    except (KeyError, RuntimeError, IndexError, TypeError):
        return None
    return env[chain[-1]] if chain else indices


def _plain_linear(node: fx.Node) -> tuple[str, str | None] | None:
    """Parameter names of an `aten.linear` over parameters of the attention module that nothing else reads."""
    if node.target is not aten.linear.default:
        return None
    parameters = [a for a in node.args[1:] if isinstance(a, fx.Node)]
    if any(p.op != "get_attr" or len(p.users) > 1 for p in parameters):
        return None
    return str(parameters[0].target), str(parameters[1].target) if len(parameters) > 1 else None


def _input_projection(
    capture: Capture, target: fx.Node, transposed: bool, heads: int, dim: int
) -> Projection | None:
    """The linear layer that makes `target` and whose features of `target` nothing else reads, or None."""
    found = _layout_chain(target, lambda n: n.target is aten.linear.default)
    names = _plain_linear(found[1]) if found else None
    if found is None or names is None:
        return None
    chain, linear = found
    out_features = int(linear.meta["val"].shape[-1])
    indices = torch.arange(out_features).expand(*_TOKENS, out_features)
    placed = _send_indices(chain, linear, indices, capture.constants)
    if placed is None:
        return None
    placed = placed.transpose(1, 2) if transposed else placed
    if tuple(placed.shape) != (1, heads, 1, dim):
        return None
    features = placed[0, :, 0].clone()
    own = set(features.flatten().tolist())
    for other in _layout_ends(linear, target):
        found = _layout_chain(other, lambda n: n is linear)
        read = _send_indices(found[0], linear, indices, capture.constants) if found else None
        if read is None or own & set(read.flatten().tolist()):
            return None
    return Projection(linear, *names, features)


def _layout_ends(source: fx.Node, target: fx.Node) -> list[fx.Node]:
    """Tensors that layout operations make of `source` and that something else reads, `target` and beyond left
    out.
    """
    ends, pending = [], [source]
    while pending:
        node = pending.pop()
        if node is target:
            continue
        moving = [u for u in node.users if u.target in LAYOUT_OPERATIONS and chain_input(u) is node]
        if _is_tensor(node) and len(moving) < len(node.users):
            ends.append(node)
        pending += moving
    return ends


def _output_projection(
    capture: Capture, attention: fx.Node | None, query_heads: int, dim: int
) -> tuple[Projection | None, OpaqueOutput | None]:
    """The linear layer, traced or called, that the attention's output reaches through layout operations."""
    if attention is None:
        return None, None
    chain: list[fx.Node] = []
    node = attention
    while True:
        if len(node.users) != 1:
            return None, None
        node = next(iter(node.users))
        last = chain[-1] if chain else attention
        if node.target is call_submodule or (
            node.target is aten.linear.default and chain_input(node) is last
        ):
            break
        if node.target not in LAYOUT_OPERATIONS:
            return None, None
        chain.append(node)
    indices = torch.arange(query_heads * dim).view(*_TOKENS, query_heads, dim)
    placed = _send_indices(chain, attention, indices, capture.constants)
    if placed is None or placed.numel() != query_heads * dim:
        return None, None
    # placed[f] is the channel that input feature f holds; features[h, d] is the inverse
    features = torch.empty(query_heads * dim, dtype=torch.int64)
    features[placed.reshape(-1)] = torch.arange(query_heads * dim)
    features = features.view(query_heads, dim)
    if node.target is call_submodule:
        return None, OpaqueOutput(str(node.args[0].target), features)
    names = _plain_linear(node)
    return (None if names is None else Projection(node, *names, features)), None


def chain_input(node: fx.Node) -> fx.Node:
    """The data input of a node: its first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _spelled(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return getattr(node.target, "__name__", str(node.target))
