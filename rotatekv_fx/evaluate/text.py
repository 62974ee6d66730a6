"""Texts, and the windows that calibration and evaluation read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rotatekv_fx.errors import InputError


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 text file.

    Raises:
        InputError: the file is missing, is no UTF-8 text, or holds only white space.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Give a readable text file.") from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a file with text in it.")
    return text


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a sequence starts with: the tokenizer's start token, or nothing where it has none (as in Qwen)."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` without any special token."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def cut_windows(ids: Sequence[int], context: int, start: Sequence[int] = (), least: int = 1) -> list[Tensor]:
    """Consecutive windows of `start` and the next `context - len(start)` ids; a short rest is left out.

    Returns:
        int64 tensors [1, context].

    Raises:
        InputError: `context` leaves fewer than two tokens, or the ids fill fewer than `least` windows.
    """
    step = context - len(start)
    if context < 2 or step < 1:
        raise InputError(f"The context is {context}; a window needs at least 2 tokens.")
    full = len(ids) // step
    if full < least:
        raise InputError(
            f"The text has {len(ids)} tokens: {full} windows of context {context}, but {least} needed; "
            "give a longer text, fewer windows or a smaller context."
        )
    return [torch.tensor([[*start, *ids[i * step : (i + 1) * step]]], dtype=torch.int64) for i in range(full)]
