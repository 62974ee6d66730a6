"""Planes of codes: how kernels multiply by the codes in 16-bit words, and how a query is laid out for that.

Codes are never converted. Words of 16 bits are masked, and what is left is read as a subnormal fp16 number,
code * 2^(bit - 24), which tensor cores multiply exactly. A plane is what one mask leaves: one code of each
word. 2^-bit goes to the query's number of that channel, and 2^24 to its scale.

A query row's channels are laid out plane by plane, their words in the order in which a warp's threads hold a
tensor-core operand: a thread's words are neighbours, and what it loads needs no exchange. 3-bit codes are a
2-bit plane and a 1-bit plane; such a group's channels come twice, for the low planes and for the high ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODE_UNIT = tl.constexpr(16777216.0)  # 2^24, the inverse of the fp16 subnormal 1
QUERY_TOP = tl.constexpr(8192.0)  # no number of a query passes it, but four times it in high planes
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def masked_bits(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """(words >> SHIFT) & MASK of int16 words, read as fp16. On a GPU two words at a time; bits that the
    shift brings over from the neighbour are masked away.
    """
    mask = tl.full(words.shape, MASK, tl.int16)
    if _INTERPRETED:
        bits = ((words.to(tl.int32) >> SHIFT) & MASK).to(tl.int16)
    elif SHIFT == 0:
        bits = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2
        )
    elif SHIFT == 8:
        bits = tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, $2;}",
            "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tl.static_assert(SHIFT == 10)
        bits = tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.b32 t, $1, 10; and.b32 $0, t, $2;}",
            "=r,r,r", [words, mask], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def code_plane(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Codes at bits PLANE * BITS of int16 words, as fp16: code / plane_factor(PLANE, BITS) * 2^-24."""
    BIT: tl.constexpr = PLANE * BITS
    SHIFT: tl.constexpr = 0 if BIT + BITS <= 10 else (10 if BITS <= 2 else 8)
    return masked_bits(words, SHIFT, ((1 << BITS) - 1) << (BIT - SHIFT))


@triton.jit
def plane_factor(PLANE: tl.constexpr, BITS: tl.constexpr):
    """2^-bit of a plane once it is shifted: what undoes its place in the word."""
    BIT: tl.constexpr = PLANE * BITS
    SHIFT: tl.constexpr = 0 if BIT + BITS <= 10 else (10 if BITS <= 2 else 8)
    return 1.0 / (1 << (BIT - SHIFT))


@triton.jit
def plane_channels(word, PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Channels of a group whose codes are in a plane of given words (byte layout: op `quantize`)."""
    BIT: tl.constexpr = PLANE * BITS
    return (BIT % 8) // BITS * (GROUP * BITS // 8) + 2 * word + BIT // 8


@triton.jit
def word_at(place, WORDS: tl.constexpr):
    """Which of a plane's words a query has at a place of its plane."""
    rest = place % (WORDS // 4)
    return rest // 4 * 16 + rest % 4 // 2 * 8 + place // (WORDS // 4) * 2 + rest % 2


@triton.jit
def in_words(x, WORDS: tl.constexpr, M: tl.constexpr):
    """Numbers [WORDS, M] in the order of places, in that of words."""
    x = tl.reshape(x, [4, WORDS // 16, 2, 2, M])
    return tl.reshape(tl.permute(x, (1, 2, 0, 3, 4)), [WORDS, M])


@triton.jit
def store_planes_of(
    y, at, channel, keep, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Store a query row's numbers y [rows, channels] at `at` [rows, 1], as planes of one kind."""
    PLANE_BYTES: tl.constexpr = GROUP * BITS // 8
    word, high = channel % PLANE_BYTES // 2, channel % 2
    bit = channel // PLANE_BYTES * BITS + 8 * high
    shift = tl.where(bit + BITS <= 10, 0, 10 if BITS <= 2 else 8)
    factor = ((127 - bit + shift) << 23).to(tl.float32, bitcast=True)  # 2^-(bit - shift)
    place = word % 8 // 2 * (WORDS // 4) + word // 16 * 4 + word % 16 // 8 * 2 + word % 2
    tl.store(at + (bit // BITS * WORDS + place)[None, :], (y * factor[None, :]).to(tl.float16), mask=keep)


@triton.constexpr_function
def wave_width(pairs):
    """Numbers of a query row beside its planes: products with cosines and sines of as many pairs, what takes
    the row's scale back, and padding to 16 bytes.
    """
    return 2 * pairs + 4


def plane_words(group: int, bits: int) -> int:
    """Words of a group's codes (of the 2-bit plane at 3 bits), padded to a tensor-core step of 16."""
    return max(16, triton.next_power_of_2(group * (2 if bits == 3 else bits) // 16))


def query_width(group: int, bits: int) -> int:
    """Places of a group in a query row."""
    return 16 // (2 if bits == 3 else bits) * plane_words(group, bits) + (256 if bits == 3 else 0)
