"""Decode attention over exact tokens: a tile of sinks, or of the window."""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv_fx.kernels.attention.scores import (
    HIDDEN,
    INTERPRETED,
    LOG2E,
    LOWEST,
    capped,
    mask_words,
    shows,
)
from rotatekv_fx.kernels.quantize.programs import as_stored, product


@triton.jit
def exact_tokens(
    batch, tile, newest, earliest, recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, NE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile's tokens [NE]: their numbers, whether they are seen, what is added to their scores (in units of
    log 2), and where they are: keys, values, rows of a head, and each token's row.
    """
    tokens = tl.arange(0, NE)
    SINK_TILES: tl.constexpr = (SINKS + NE - 1) // NE
    index = tokens + (tile - SINK_TILES) * NE
    number = newest - WINDOW + 1 + index
    seen = (number >= earliest) & (number >= 0) & (index < WINDOW)
    keys, values, rows_held, slot = recent_keys, recent_values, ring, number % ring
    if SINKS > 0:  # noqa: SIM102, a constant and a runtime condition
        if tile < SINK_TILES:
            index = tokens + tile * NE
            number = tl.load(sink_tokens + batch.to(tl.int64) * SINKS + index, mask=index < SINKS, other=-1)
            seen = (number >= earliest) & (number >= 0) & (number <= newest - WINDOW)
            keys, values, rows_held, slot = sink_keys, sink_values, SINKS, index
    if MASKED:
        mask_ptr += batch.to(tl.int64) * mask_stride
        words = mask_words(mask_ptr, number, seen, mask_offset, mask_columns, MASKED)
        seen = shows(words, MASKED)
    bias = tl.zeros([NE], tl.float32)
    if MASKED == 2:
        bias = words.to(tl.float32) * LOG2E
    return number, seen, bias, keys, values, rows_held, slot


@triton.jit
def _exact_rows(
    held_ptr, slot, new_ptr, is_new, seen, D: tl.constexpr, DP: tl.constexpr, NEW: tl.constexpr
):  # fmt: skip
    """Rows [NE, DP] of one head at its slots; or where NEW, of the new token where it is."""
    channel = tl.arange(0, DP)
    keep = seen[:, None] & (channel < D)[None, :]
    at = held_ptr + slot[:, None] * D
    if not NEW:
        x = tl.load(at + channel[None, :], mask=keep, other=0.0)
    elif held_ptr.dtype == new_ptr.dtype:
        x = tl.load(tl.where(is_new[:, None], new_ptr, at) + channel[None, :], mask=keep, other=0.0)
        x = as_stored(x, x.dtype)
    else:
        x = tl.load(at + channel[None, :], mask=keep & (is_new == 0)[:, None], other=0.0)
        new = tl.load(new_ptr + channel, mask=channel < D, other=0.0)
        x = tl.where(is_new[:, None], as_stored(new, x.dtype)[None, :], x)
    return x


@triton.jit
def attend_exact(
    batch, unit, tile, part, newest, earliest,
    query_ptr, new_keys, new_values, recent_keys, recent_values, sink_keys, sink_values, sink_tokens,
    mask_ptr, mask_stride, mask_offset, mask_columns,
    scale, softcap, units, ring, score_ptr, columns, out_ptr, weight_ptr,
    R: tl.constexpr, M: tl.constexpr, U: tl.constexpr, REPEATS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, NE: tl.constexpr, EXACT: tl.constexpr, SCORED: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Weights and values of one tile of sinks that left the window, or of the window's tokens.

    The new token's key and value come from where they were made, so that nothing is waited for. But where
    the tokens are SCORED, a query row has `columns` of scores at `score_ptr`, the last of them of these
    tokens, and values come from the ring.
    """
    NEW: tl.constexpr = WINDOW > 0 and not SCORED
    rows = tl.arange(0, M)
    channel, value_channel = tl.arange(0, DP), tl.arange(0, DVP)
    inside = rows < R
    row = ((batch * units + unit) * R + rows).to(tl.int64)
    number, seen, bias, keys, values, rows_held, slot = exact_tokens(
        batch, tile, newest, earliest, recent_keys, recent_values, ring, sink_keys, sink_values, sink_tokens,
        mask_ptr, mask_stride, mask_offset, mask_columns, SINKS, WINDOW, NE, MASKED,
    )  # fmt: skip
    is_new = (number == newest) & NEW
    key_words = ()
    value_words = ()
    queries = ()
    for u in tl.static_range(U):
        at = ((batch * units + unit) * U + u).to(tl.int64)
        own = inside & (rows // REPEATS == u)
        if not SCORED:
            x = _exact_rows(keys + at * rows_held * D, slot, new_keys + at * D, is_new, seen, D, DP, NEW)
            key_words = key_words + (x,)
        x = _exact_rows(values + at * rows_held * DV, slot, new_values + at * DV, is_new, seen, DV, DVP, NEW)
        value_words = value_words + (tl.trans(x),)
        if not SCORED:
            queries = queries + (
                tl.load(
                    query_ptr + row[None, :] * D + channel[:, None],
                    mask=own[None, :] & (channel < D)[:, None], other=0.0,
                ),
            )  # fmt: skip
    if SCORED:
        column = columns - EXACT * NE + tile * NE + tl.arange(0, NE)
        scores = tl.load(
            score_ptr + row[None, :] * columns + column[:, None], mask=inside[None, :], other=HIDDEN
        )
    tl.debug_barrier()  # so that all loads are under way before the first is waited for
    if not SCORED:
        scores = tl.zeros([NE, M], tl.float32)
        for u in tl.static_range(U):
            if query_ptr.dtype.element_ty == recent_keys.dtype.element_ty and not INTERPRETED:
                scores = tl.dot(key_words[u], queries[u], scores)
            else:
                scores = product(key_words[u], queries[u].to(tl.float32), scores)
        scores = scores * (scale * LOG2E)
    scores = capped(scores, softcap, SOFTCAP)
    scores = tl.where(seen[:, None], scores + bias[:, None], HIDDEN)
    highest = tl.maximum(tl.max(scores, 0), LOWEST)
    weights = tl.exp2(scores - highest[None, :])
    part = part * R + rows
    tl.store(weight_ptr + part * 2, highest, mask=inside)
    tl.store(weight_ptr + part * 2 + 1, tl.sum(weights, 0), mask=inside)
    for u in tl.static_range(U):
        own = inside & (rows // REPEATS == u)
        result = product(value_words[u], weights, tl.zeros([DVP, M], tl.float32))
        tl.store(
            out_ptr + part[None, :] * DV + value_channel[:, None], result,
            mask=own[None, :] & (value_channel < DV)[:, None],
        )  # fmt: skip
