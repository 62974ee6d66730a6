"""A site's RoPE by itself: a function of keys and positional inputs, and what kind of map it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rotatekv_fx.sites import AttentionSite, replay, rope_region

aten = torch.ops.aten
LINEAR = 1e-3  # relative error up to which RoPE counts as a linear map
_AT_ONCE = 16  # unit vectors that one call of RoPE turns


class Rope(nn.Module):
    """`rope(key [B, Hkv, S, D], *positional inputs)` with the captured operations.

    Its constants are buffers outside the state_dict. Without positional inputs (NoPE) it is the identity.
    """

    def __init__(self, site: AttentionSite):
        super().__init__()
        self.heads, self.dim = site.kv_heads, site.head_dim
        graph = fx.Graph()
        placeholders = {n.name: n for n in site.graph.find_nodes(op="placeholder")}
        key = graph.placeholder("key")
        env = {site.key_pre: key}
        if site.key_pre_transposed:
            env[site.key_pre] = graph.call_function(aten.transpose.int, (key, 1, 2))
        for source in site.positional:
            env[placeholders[source.name]] = graph.placeholder(source.name)
        turned = site.key_pre is not site.key_post
        graph.output(replay(graph, rope_region(site), env)[site.key_post] if turned else key)
        self.module = fx.GraphModule(attributes(site, graph), graph)
        for child in self.module.modules():
            child._non_persistent_buffers_set |= set(child._buffers)
        self.turned = turned

    def forward(self, key: Tensor, *positional: Tensor) -> Tensor:
        return self.module(key, *positional)

    def vectors(self, x: Tensor, positional: tuple[Tensor, ...]) -> Tensor:
        """RoPE of a vector [D], or of one for each row [B, D], at every token: fp32 [B, S, D]."""
        batch, tokens = positional[0].shape[:2]
        key = x.float()[..., None, None, :].expand(batch, self.heads, tokens, -1)
        rows = (p.float() if p.is_floating_point() else p for p in positional)
        return self(key, *rows)[:, 0].float()

    def partners(self, positional: tuple[Tensor, ...]) -> tuple[Tensor, float]:
        """Describe RoPE as (R_n x)_c = a_c(n) x_c + b_c(n) x_c'.

        Args:
            positional: the positional inputs of a few tokens, [1, S, ...].

        Returns:
            c' of each channel c, int64 [D] (c itself where nothing is turned), and the largest relative error
            of the description on a random vector and of RoPE's linearity; infinite where channels don't come
            in pairs.
        """
        own = torch.arange(self.dim)
        if not self.turned:
            return own, 0.0
        device = positional[0].device
        weight = torch.cat(
            [
                self.vectors(some, tuple(p.repeat_interleave(len(some), 0) for p in positional)).abs().amax(1)
                for some in torch.eye(self.dim, device=device).split(_AT_ONCE)
            ]
        ).T.cpu()
        others = weight - torch.diag(weight.diagonal())
        partner = torch.where(others.amax(1) > 1e-4 * weight.amax(), others.argmax(1), own)
        if not torch.equal(partner[partner], own):
            return own, float("inf")
        x = torch.randn(self.dim, generator=torch.Generator().manual_seed(0)).to(device)
        a, b = (t.float() for t in self.coefficients(partner, positional, positional[0].shape[1]))
        actual = self.vectors(x, positional)
        described = a * x + b * x[partner.to(device)]
        doubled = self.vectors(2 * x, positional) / 2
        error = torch.stack([(described - actual).norm(), (doubled - actual).norm()]).max() / actual.norm()
        return partner, float(error)

    def coefficients(
        self, partner: Tensor, positional: tuple[Tensor, ...], tokens: int
    ) -> tuple[Tensor, Tensor]:
        """a and b of each token, float64 [B or 1, S, D]: RoPE of the pairs' first channels, and of their
        second.
        """
        if not self.turned:
            ones = torch.ones(1, tokens, self.dim, dtype=torch.float64)
            return ones, torch.zeros_like(ones)
        device, channels = positional[0].device, torch.arange(self.dim)
        first, turned = (channels <= partner).to(device), (channels != partner).to(device)
        from_first, from_second = self.vectors(first, positional), self.vectors(~first, positional)
        a = torch.where(first, from_first, from_second)
        b = torch.where(first, from_second, from_first) * turned
        return a.double(), b.double()


def attributes(site: AttentionSite, graph: fx.Graph) -> dict[str, Any]:
    """Tensors and modules that the `get_attr` nodes of a graph name, before the module is rewritten."""
    constants = {f"rotatekv.{name}": tensor for name, tensor in site.capture.constants.items()}
    own = {
        **dict(site.capture.module.named_modules()),
        **dict(site.capture.module.named_parameters()),
        **dict(site.capture.module.named_buffers()),
        **constants,
    }
    found = {str(n.target): own[str(n.target)] for n in graph.nodes if n.op == "get_attr"}
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in found.items()}
