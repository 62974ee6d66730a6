"""What attention masks say: they are bool, or are added to scores."""

from __future__ import annotations

import torch
from torch import Tensor


def hidden_below(dtype: torch.dtype) -> float:
    """Half the least number of a floating dtype: a mask that is added hides what is not above it. Masks add
    the least number itself, or what is left of it where a small bias was added too.
    """
    return torch.finfo(dtype).min / 2


def as_bool(mask: Tensor) -> Tensor:
    """A mask of any shape, bool or floating, as bool: True where it lets see."""
    return mask if mask.dtype is torch.bool else mask > hidden_below(mask.dtype)
