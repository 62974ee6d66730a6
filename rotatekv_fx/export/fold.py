"""Work moved from cached keys to the query: the inverse rotation, and the mean as a position term.

With a key k^ = y M + R_n mu of codes y, the score of query q is (M q) . y + q . R_n mu. M q is a few numbers
a query head. (R_n mu)_c = a_c(n) mu_c + b_c(n) mu_c', so the second term is a product of numbers of the query
with a row of cosines and sines at n, which all heads and layers share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rotatekv_fx.cache import PositionPlan
from rotatekv_fx.cache.codec import Codec
from rotatekv_fx.errors import StateError
from rotatekv_fx.export.codes import key_products, regroup
from rotatekv_fx.export.state import base_of
from rotatekv_fx.rope import Rope

_PROBES = 64  # positions at which columns of cosines and sines are compared
_SAME = 1e-5  # largest difference of two that are one


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
    size, channels = inverse.shape[-1], codec.heads * head_dim
    blocks, span = inverse.expand(channels // size, -1, -1), math.lcm(size, codec.quantizer.group)
    if span > size:  # groups of channels reach over blocks
        blocks = torch.stack([torch.block_diag(*some) for some in blocks.split(span // size)])
    turn = blocks.unflatten(2, (-1, head_dim)).permute(0, 2, 3, 1).flatten(0, 1)
    return turn.contiguous(), blocks.shape[0]


def folded_scores(codec: Codec, blocks: int, rows: Tensor, parts: tuple[Tensor, ...], turn: Tensor) -> Tensor:
    """Scores of one token's queries with coded keys, without their mean.

    Args:
        rows: queries by KV head, [B, Hkv, R, D].
        parts: codes [B, Ng, bytes, C], scale and offset [B, Ng, C].
        turn, blocks: what `fold_inverse` returned.

    Returns:
        [B, blocks, rows of a block, C], heads in their order.
    """
    group, batch = codec.quantizer.group, rows.shape[0]
    weight = regroup((rows @ turn).reshape(batch, blocks, -1, turn.shape[2]), group)
    codes, scale, _ = parts
    scores = key_products(weight, codes, codec.quantizer.bits) * scale.float()[:, :, None]
    scores = scores + weight.sum(-1, keepdim=True) * base_of(codec, parts)[:, :, None]
    groups = turn.shape[2] // group
    return scores.unflatten(1, (blocks, groups)).sum(2) if groups > 1 else scores


class Mean(nn.Module):
    """RoPE of the keys' calibrated mean, from the rows of cosines and sines that the model's RoPE reads.

    Attributes:
        spread: [Hkv, F, D], takes F features of a position to the mean there.
        kept: places of the features among all positional inputs and a one.
    """

    def __init__(self, center: Tensor, rope: Rope, positions: PositionPlan):
        """`center`: [Hkv, D].

        Raises:
            StateError: RoPE's coefficients are not entries of its rows.
        """
        super().__init__()
        self.positions = positions if rope.turned else None
        ids = torch.arange(_PROBES)[None] * 7
        rows = positions.decode((ids.int()[:, None, :, None],)) if rope.turned else ()
        partner = rope.partners(rows)[0] if rope.turned else torch.arange(rope.dim)
        a, b = (t[0] for t in rope.coefficients(partner, rows, _PROBES))
        entries = torch.cat(self._entries(ids), -1)[0].double()
        found = [_place(entries, column) for column in torch.cat([a, b], 1).T]
        self.kept = sorted({place for place, sign in found if sign})
        made = torch.zeros(2, rope.dim, len(self.kept), dtype=torch.float64)
        for channel, (place, sign) in enumerate(found):
            if sign:
                made.view(-1, len(self.kept))[channel, self.kept.index(place)] = sign
        center = center.double()
        mean = center[:, :, None] * made[0] + center[:, partner, None] * made[1]
        self.register_buffer("spread", mean.transpose(1, 2).float().contiguous(), persistent=False)

    def features(self, ids: Tensor) -> Tensor:
        """Position ids [B, N] -> [B, N, F]."""
        pieces, first = [], 0
        for entries in self._entries(ids):
            kept = [place - first for place in self.kept if 0 <= place - first < entries.shape[-1]]
            if len(kept) == entries.shape[-1]:
                pieces.append(entries)
            elif kept:
                pieces.append(entries.index_select(2, torch.tensor(kept)))
            first += entries.shape[-1]
        return torch.cat(pieces, 2)

    def _entries(self, ids: Tensor) -> list[Tensor]:
        """The positional inputs of tokens, without repetition, and a one: [B, N, any] each."""
        with _Once():
            rows = () if self.positions is None else self.positions.decode((ids.int()[:, None, :, None],))
        return [*(row.float() for row in rows), torch.ones(*ids.shape, 1, device=ids.device)]


class _Once(TorchFunctionMode):
    """Leaves out a tensor's second copy where a RoPE puts it beside the first: half the cosines and sines."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 2 and args[0][0] is args[0][1]:
            return args[0][0]
        return func(*args, **(kwargs or {}))


def _place(entries: Tensor, column: Tensor) -> tuple[int, float]:
    """Which of `entries`' columns [n, C] equals `column` [n] or its negative, and the sign; 0 for zeros."""
    if float(column.abs().max()) <= _SAME:
        return 0, 0.0
    for sign in (1.0, -1.0):
        same = ((entries - sign * column[:, None]).abs().amax(0) <= _SAME).nonzero()
        if len(same):
            return int(same[0]), sign
    raise StateError(
        "the graph's position term needs a RoPE whose coefficients are entries of its cosines and sines; "
        "use recipe='paper'."
    )
