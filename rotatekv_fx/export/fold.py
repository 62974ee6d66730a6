"""Work moved from cached keys to the query: the inverse rotation, and the mean as a position term.

With a key k^ = y M + R_n mu of codes y, the score of query q is (M q) . y + q . R_n mu. M q is a few numbers
a query head. (R_n mu)_c = a_c(n) mu_c + b_c(n) mu_c', so the second term is a product of numbers of the query
with a row of cosines and sines at n, which all heads and layers share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotatekv_fx.cache import PositionPlan
from rotatekv_fx.cache.codec import Codec
from rotatekv_fx.export.codes import key_products
from rotatekv_fx.export.state import base_of
from rotatekv_fx.rope import Rope

_PROBES = 64  # positions at which rows are compared
_SAME = 1e-6  # largest difference of two columns of cosines or sines that are one


def fold_inverse(inverse: Tensor | None, codec: Codec, head_dim: int) -> tuple[Tensor, int]:
    """The keys' inverse rotation as a map of queries.

    Args:
        inverse: [n or 1, M', M'], undoes the keys' rotation block by block; None for none.

    Returns:
        [Hkv, D, M], which takes a query of each KV head to the M channels of its block of rotated heads, and
        the number of blocks.
    """
    if inverse is None:
        inverse = torch.eye(head_dim)[None]
    blocks = inverse.expand(codec.heads * head_dim // inverse.shape[-1], -1, -1)
    if blocks.shape[-1] % codec.quantizer.group:  # groups of channels reach over blocks
        blocks = torch.block_diag(*blocks)[None]
    turn = blocks.unflatten(2, (-1, head_dim)).permute(0, 2, 3, 1).flatten(0, 1)
    return turn.contiguous(), blocks.shape[0]


def folded_scores(codec: Codec, blocks: int, query: Tensor, parts: tuple[Tensor, ...], turn: Tensor) -> Tensor:
    """Scores [B, Hq, S, C] of queries [B, Hq, S, D] with coded keys, without their mean.

    Args:
        parts: codes [B, Ng, C, bytes], scale and offset [B, Ng, C].
        turn, blocks: what `fold_inverse` returned.
    """
    batch, query_heads, tokens, dim = query.shape
    q, heads, (codes, scale, _) = codec.quantizer, codec.heads, parts
    rows = query.reshape(batch, heads, query_heads // heads * tokens, dim) @ turn
    grouped = rows.reshape(batch, blocks, query_heads // blocks * tokens, turn.shape[2] // q.group, q.group)
    weight = grouped.permute(0, 1, 3, 4, 2).flatten(1, 2)  # [B, Ng, group, rows of a block]
    products = key_products(codes, q.bits, weight) * scale.float()[..., None]
    products = products + base_of(codec, parts)[..., None] * weight.sum(2)[:, :, None]
    summed = products.unflatten(1, (blocks, turn.shape[2] // q.group)).sum(2).transpose(-1, -2)
    return summed.reshape(batch, query_heads, tokens, codes.shape[2])


class Mean(nn.Module):
    """RoPE of the keys' calibrated mean, from rows of distinct cosines and sines.

    Attributes:
        spread: [Hkv, F, D], takes a row of F features to the mean at that position.
    """

    def __init__(self, center: Tensor, rope: Rope, positions: PositionPlan):
        """`center`: [Hkv, D]."""
        super().__init__()
        self.rope, self.positions = rope, positions
        partner = torch.arange(rope.dim)
        if rope.turned:
            partner, _ = rope.partners(self._rows(torch.arange(_PROBES)[None] * 7))
        first = torch.arange(rope.dim) <= partner
        self.register_buffer("halves", torch.stack([first, ~first]).float(), persistent=False)
        both = self._both(torch.arange(_PROBES)[None] * 7)[0].double()  # [probes, 2 D]
        kept, spread = _distinct(both)
        a, b = spread.chunk(2, 1)
        own = torch.where(first, a, b), torch.where(first, b, a)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        center = center.double()
        mean = own[0] * center[:, None] + own[1] * center[:, None, partner] * (partner != torch.arange(rope.dim))
        self.register_buffer("spread", mean.float(), persistent=False)

    def features(self, ids: Tensor) -> Tensor:
        """Position ids [B, N] -> [B, N, F]."""
        return self._both(ids).index_select(-1, self.kept)

    def _both(self, ids: Tensor) -> Tensor:
        """RoPE of the pairs' first channels, and of their second: [B, N, 2 D]."""
        if not self.rope.turned:
            return self.halves.flatten().expand(*ids.shape, -1)
        rows = self._rows(ids)
        turned = [
            self.rope(half.expand(ids.shape[0], self.rope.heads, ids.shape[1], -1), *rows)[:, 0]
            for half in self.halves
        ]
        return torch.cat(turned, -1)

    def _rows(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.positions.decode((ids.int()[:, None, :, None],))


def _distinct(columns: Tensor) -> tuple[list[int], Tensor]:
    """Columns that are not another's, and how they make all of them.

    Args:
        columns: [n, C].

    Returns:
        Places of the distinct columns, F of them, and float64 [F, C] of 0, 1 and -1.
    """
    kept: list[int] = []
    made = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for place, column in enumerate(columns.T):
        if float(column.abs().max()) <= _SAME:
            continue
        others = columns[:, kept]
        for sign in (1.0, -1.0):
            same = ((others - sign * column[:, None]).abs().amax(0) <= _SAME).nonzero()
            if len(same):
                made[int(same[0]), place] = sign
                break
        else:
            made[len(kept), place] = 1.0
            kept.append(place)
    return kept, made[: len(kept)]
