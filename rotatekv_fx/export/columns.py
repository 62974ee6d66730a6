"""Which columns a query sees, as bool masks [B, 1, S, N]."""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx import masks


def visible_tokens(mask: Tensor | None, queries: Tensor, total: int) -> Tensor:
    """What the model's mask lets each query see of all tokens, [B or 1, 1, S, T].

    Args:
        mask: [B or 1, 1, S, T], bool or additive, or None for a causal one.
        queries: int64 [S], numbers of the new tokens.
        total: T.
    """
    if mask is None:
        return (torch.arange(total, device=queries.device) <= queries[:, None])[None, None]
    return masks.as_bool(mask)


def see_themselves(visible: Tensor, queries: Tensor) -> Tensor:
    """[B, S] of whether each new token sees itself: False marks padding."""
    places = queries.view(1, -1, 1).expand(visible.shape[0], -1, 1)
    return visible[:, 0].gather(-1, places).squeeze(-1)


def coded(visible: Tensor, numbers: Tensor, queries: Tensor, window: int) -> Tensor:
    """Columns that hold codes of tokens `numbers` [C]: seen outside the window."""
    return visible.index_select(-1, numbers) & (numbers <= queries[:, None] - window)


def exact(visible: Tensor, numbers: Tensor, queries: Tensor, window: int) -> Tensor:
    """Columns that hold exact tokens `numbers` [R + S]: seen inside the window."""
    return visible.index_select(-1, numbers) & (numbers > queries[:, None] - window)


def sinks(visible: Tensor, tokens: Tensor, queries: Tensor, window: int) -> Tensor:
    """Columns of sink tokens [B, count], -1 for none: seen outside the window."""
    batch = tokens.shape[0]
    places = tokens.clamp(min=0)[:, None, None].expand(-1, 1, queries.shape[0], -1)
    seen = visible.expand(batch, -1, -1, -1).gather(-1, places)
    outside = (tokens >= 0)[:, None] & (tokens[:, None] <= queries[:, None] - window)
    return seen & outside[:, None]


def without_sinks(visible: Tensor, tokens: Tensor, first: Tensor) -> Tensor:
    """Hide the codes of sink tokens.

    Args:
        visible: [B or 1, 1, S, C], of tokens `first` [1] onwards.
        tokens: int64 [B, count], -1 for none.
    """
    return visible & ~_marked(tokens, first, visible.shape[-1])[:, None, None]


def _marked(tokens: Tensor, first: Tensor, length: int) -> Tensor:
    """bool [.., length], true at these tokens [.., count] among the tokens `first` [1] onwards."""
    places = torch.where(tokens < first, length, (tokens - first).clamp(max=length))  # cut off: the last
    marks = torch.zeros(*tokens.shape[:-1], length + 1, dtype=torch.int32, device=tokens.device)
    return marks.scatter(-1, places, torch.ones_like(tokens, dtype=torch.int32))[..., :length] != 0


def biases(window: int, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What to add to the scores of the last query, layer by layer, to hide what it does not see.

    Args:
        window: recent tokens that are exact.
        t: visible [B or 1, 1, S, T]; coded [C], first [1] and kept [X], numbers of the tokens in the coded
            columns, of the first of them, and of those in the window; and the others, sink tokens [B, count]
            of each layer (-1 for none), if they have any.

    Returns:
        fp32 [B, 1, 1, C + count + X] of each layer, or one [B or 1, 1, 1, C + X] for all.
    """
    row = t["visible"][:, :, -1]
    coded = row.index_select(2, t["coded"])
    layers = [tokens for name, tokens in t.items() if name.startswith("sink_tokens")]
    seen = []
    if layers:
        tokens = torch.stack(layers, 1).long()  # [B, layers, count]
        row = row.expand(tokens.shape[0], len(layers), -1)
        coded = coded & ~_marked(tokens, t["first"], coded.shape[-1])
        outside = (tokens >= 0) & (tokens < row.shape[-1] - window)
        seen = [row.gather(2, tokens.clamp(min=0)) & outside]
    if window:
        seen.append(row.index_select(2, t["kept"]))
    every = torch.where(torch.cat([coded, *seen], 2), 0.0, torch.finfo(torch.float32).min)
    return every[:, :, None].split(1, 1)
