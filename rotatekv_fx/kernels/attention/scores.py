"""What the parts of decode attention share: hidden scores, masks and soft-caps."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e30)  # score of a hidden token
LOWEST = tl.constexpr(-5.0e29)  # where the running maximum starts: hidden tokens weigh 2^-5e29 = 0


@triton.jit
def mask_words(mask_ptr, number, held, mask_offset, mask_columns, MASKED: tl.constexpr):
    """What a sequence's row of a mask says of tokens: bytes (MASKED is 1), or what to add to scores (2).
    Tokens that are not held, and those without a column, are hidden.
    """
    column = number - mask_offset
    known = held & (column >= 0) & (column < mask_columns)
    mask_ptr += column
    if MASKED == 2:
        words = tl.load(mask_ptr, mask=known, other=-float("inf"))
    else:
        words = tl.load(mask_ptr, mask=known, other=0)
    return words


@triton.jit
def shows(words, MASKED: tl.constexpr):
    """Whether tokens are seen: more than half the least number of the dtype is added to their scores."""
    if MASKED == 2:
        half: tl.constexpr = -32752.0 if words.dtype == tl.float16 else -1.7e38
        seen = words.to(tl.float32) > half
    else:
        seen = words != 0
    return seen


@triton.jit
def capped(score, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(score / softcap), in and out in units of log 2."""
    if SOFTCAP:
        cap = softcap * LOG2E
        score = cap * (1.0 - 2.0 / (tl.exp2(score / softcap * 2.0) + 1.0))
    return score


@triton.jit
def prefetch(pointers):
    """Bring what pointers point at to the L2 cache."""
    tl.inline_asm_elementwise(
        "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
