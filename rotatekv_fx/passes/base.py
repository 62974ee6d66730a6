"""What a pass is: a named rewrite of one attention site, its place in the order, and its counted result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, fx

from rotatekv_fx.recipes.base import LayerPlan
from rotatekv_fx.sites import AttentionSite

aten = torch.ops.aten


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a captured tensor, or of the captured tensor that an inserted node was made of."""
    while "val" not in node.meta:
        node = node.args[0]
    return node.meta["val"].dtype


@dataclasses.dataclass
class Rewrite:
    """One site while passes work on it: the nodes that carry each role, and what must change on the module.

    Attributes:
        site: where things were found; its graph is rewritten in place.
        plan: what the recipe computed for this layer.
        position_inputs: the inputs that the stored positions are made of, by name.
        exact_key: the key in the form that exact tokens are kept in.
        key, value: what will be quantized, [B, Hkv, S, D].
        key_coded, value_coded: what comes out of the (de)quantizer.
        key_read, value_read: what is read, in the form that exact tokens are kept in.
        key_attended, value_attended: what the attention reads.
        residual: placeholder of the enclosing block's input, once sinks are preserved.
        positions_read: the positional inputs of the stored keys, by the input's name.
        turns_on_read: whether the runtime can turn keys that are stored before RoPE, and attend to them.
        exact_dtype: what exact tokens are rounded to by the graph itself; None where the cache that they go
            to does it.
        buffers: tensors that the graph reads below `rotatekv.` on the module.
        folded: changed parameters by name, in float64; rounded once when they are bound.
    """

    site: AttentionSite
    plan: LayerPlan
    position_inputs: tuple[str, ...] = ()
    exact_key: fx.Node | None = None
    key: fx.Node | None = None
    value: fx.Node | None = None
    key_coded: fx.Node | None = None
    value_coded: fx.Node | None = None
    key_read: fx.Node | None = None
    value_read: fx.Node | None = None
    key_attended: fx.Node | None = None
    value_attended: fx.Node | None = None
    residual: fx.Node | None = None
    positions_read: dict[str, fx.Node] = dataclasses.field(default_factory=dict)
    turns_on_read: bool = False
    exact_dtype: torch.dtype | None = None
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    folded: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.site.graph

    def as_exact(self, node: fx.Node) -> fx.Node:
        """`node`, rounded to `exact_dtype` (and stopping at its largest value) and back to its own dtype."""
        own, exact = dtype_of(node), self.exact_dtype
        if exact is None or exact is own:
            return node
        limit = torch.finfo(exact).max
        clamped = self.graph.call_function(aten.clamp.default, (node, -limit, limit))
        rounded = self.graph.call_function(aten.to.dtype, (clamped, exact))
        return self.graph.call_function(aten.to.dtype, (rounded, own))

    @property
    def mask(self) -> fx.Node | None:
        return self.site.mask


@dataclasses.dataclass(frozen=True)
class Pass:
    """A named rewrite: `function(rewrite)` returns what it counted; it must run after the passes named in
    `after`.
    """

    name: str
    after: tuple[str, ...]
    function: Callable[[Rewrite], dict[str, int]]
