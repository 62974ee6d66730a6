"""The ops `attend`, `select_sinks`, `take_tokens` and `restore_sinks`, against plain loops."""

import math

import numpy as np
import pytest
import torch

from rotatekv_fx import ops  # noqa: F401  (registers the ops)
from rotatekv_fx.errors import ConfigError

attend = torch.ops.rotatekv.attend
select_sinks = torch.ops.rotatekv.select_sinks
restore_sinks = torch.ops.rotatekv.restore_sinks
take_tokens = torch.ops.rotatekv.take_tokens


def attend_by_loops(query, key, value, bias, scale, softcap=0.0, sink_logits=None):
    """One query at a time in float64; `bias` [B, Hq, S, N] is added to the scores, -inf hides a key."""
    query, key, value, bias = (t.double().numpy() for t in (query, key, value, bias))
    batch, heads, tokens, _ = query.shape
    repeats = heads // key.shape[1]
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b, h, i in np.ndindex(batch, heads, tokens):
        seen = [j for j in range(key.shape[2]) if bias[b, h, i, j] > -np.inf]
        scores = [scale * float(query[b, h, i] @ key[b, h // repeats, j]) for j in seen]
        if softcap:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        weights = [math.exp(s + bias[b, h, i, j]) for s, j in zip(scores, seen, strict=True)]
        total = sum(weights) + (math.exp(sink_logits[h].item()) if sink_logits is not None else 0.0)
        for w, j in zip(weights, seen, strict=True):
            out[b, i, h] += w / total * value[b, h // repeats, j]
    return torch.from_numpy(out)


def relative_rms(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def inputs(batch=2, heads=6, kv_heads=2, tokens=5, length=9, dim=8, value_dim=12, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(batch, heads, tokens, dim, dtype=dtype),
        torch.randn(batch, kv_heads, length, dim, dtype=dtype),
        torch.randn(batch, kv_heads, length, value_dim, dtype=dtype),
    )


def causal_bias(batch, heads, tokens, length):
    rows = [[0.0 if j <= i + length - tokens else -math.inf for j in range(length)] for i in range(tokens)]
    return torch.tensor(rows).expand(batch, heads, tokens, length)


CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"softcap": 1.5}, id="softcap"),
    pytest.param({"sink_logits": torch.tensor([0.3, -1.0, 2.0, 5.0, 0.0, -9.0])}, id="sink-logits"),
    pytest.param({"softcap": 4.0, "sink_logits": torch.linspace(-2, 2, 6)}, id="both"),
]


def call(query, key, value, mask, scale, softcap=0.0, sink_logits=None, causal=False):
    return attend(query, key, value, mask, scale, softcap, sink_logits, causal)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize(
    "sizes", [{}, {"tokens": 1, "length": 1}, {"tokens": 9, "dim": 65, "value_dim": 65, "kv_heads": 6}]
)
def test_attend_without_mask(options, sizes):
    query, key, value = inputs(**sizes)
    out = call(query, key, value, None, 0.3, **options)
    batch, heads, tokens, _ = query.shape
    assert out.shape == (batch, tokens, heads, value.shape[3])
    everything = torch.zeros(batch, heads, tokens, key.shape[2])
    assert relative_rms(out, attend_by_loops(query, key, value, everything, 0.3, **options)) < 1e-6


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize(("tokens", "length"), [(5, 9), (9, 9), (1, 9), (2, 2)])
def test_attend_causal_counts_from_the_last_key(tokens, length, options):
    query, key, value = inputs(tokens=tokens, length=length)
    out = call(query, key, value, None, 0.5, causal=True, **options)
    expected = attend_by_loops(query, key, value, causal_bias(2, 6, tokens, length), 0.5, **options)
    assert relative_rms(out, expected) < 1e-6
    ones = torch.ones(1, 1, tokens, length, dtype=torch.bool)
    full = call(query, key, value, ones, 0.5, causal=True, **options)  # a given mask rules
    assert (tokens == 1) == (relative_rms(full, expected) < 1e-6)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 9), (2, 1, 5, 9), (1, 1, 5, 9), (2, 1, 1, 9), (5, 9), (2, 1, 5, 14)]
)
def test_attend_with_a_mask_of_any_broadcastable_shape(shape, options):
    query, key, value = inputs()
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(shape, generator=generator) > 0.4
    visible[..., 3] = True
    biased = torch.randn(shape, generator=generator).masked_fill(~visible, -torch.inf)
    for mask, bias in ((visible, torch.zeros(shape).masked_fill(~visible, -torch.inf)), (biased, biased)):
        expected = attend_by_loops(query, key, value, bias[..., :9].expand(2, 6, 5, 9), 0.35, **options)
        assert relative_rms(call(query, key, value, mask, 0.35, **options), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CASES)
def test_attend_keeps_a_16_bit_dtype(dtype, options):
    query, key, value = inputs(dtype=dtype)
    mask = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    out = call(query, key.float(), value, mask, 0.3, **options)  # mask and key are cast
    assert out.dtype == dtype
    expected = attend_by_loops(query, key, value, torch.zeros(2, 6, 5, 9), 0.3, **options)
    assert relative_rms(out, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_attend_has_the_numbers_of_the_models_own_attention():
    query, key, value = inputs(tokens=9, dim=16, value_dim=16, dtype=torch.bfloat16)
    own = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), is_causal=True, scale=0.25
    )
    out = call(query, key, value, None, 0.25, causal=True)
    assert relative_rms(out, own.transpose(1, 2).double()) < 5e-4  # equal, but for a rare tie of the rounding


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_no_key_is_finite(hidden, dtype, options):
    query, key, value = inputs(dtype=dtype)
    shape = (2, 1, 5, 9)
    mask = torch.ones(shape, dtype=torch.bool) if hidden is False else torch.zeros(shape)
    mask[0, :, :2] = hidden  # left padding of the first sequence
    out = call(query, key, value, mask, 0.3, **options)
    assert out.isfinite().all()
    if hidden != torch.finfo(torch.float32).min:
        assert out[0, :2].eq(0.0).all()
    others = call(query, key, value, None, 0.3, **options)
    torch.testing.assert_close(out[1], others[1])
    torch.testing.assert_close(out[0, 2:], others[0, 2:])


def test_hidden_keys_have_no_influence():
    query, key, value = inputs()
    mask = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    mask[..., 6:] = False
    out = call(query, key, value, mask, 0.3)
    key[:, :, 6:], value[:, :, 6:] = 1e4, -1e4
    assert torch.equal(call(query, key, value, mask, 0.3), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 5, 1, 8)}, "5 query heads for 2 KV heads"),
        ({"query": torch.zeros(1, 4, 8)}, "query has shape"),
        ({"query": torch.zeros(1, 4, 1, 7)}, "channels of query and key are 7 and 8"),
        ({"value": torch.zeros(1, 1, 3, 8)}, "heads of key and value are 2 and 1"),
        ({"mask": torch.zeros(1, 3, dtype=torch.int64)}, r"mask is torch\.int64"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"sink_logits": torch.zeros(3)}, r"\[3\]; use \[4\]"),
    ],
)
def test_attend_refuses_what_does_not_fit(change, message):
    fitting = {
        "query": torch.zeros(1, 4, 1, 8),
        "key": torch.zeros(1, 2, 3, 8),
        "value": torch.zeros(1, 2, 3, 8),
        "mask": None,
    }
    with pytest.raises(ConfigError, match=message):
        call(**(fitting | {"scale": 1.0} | change))


# Sinks


def select_by_sorting(residual, valid, count):
    """[(score, token)] of each sequence, largest first."""
    result = []
    for b, rows in enumerate(residual.abs().tolist()):
        entries = [
            (value, s) for s, row in enumerate(rows) for value in row if valid is None or bool(valid[b, s])
        ]
        entries = sorted(entries, reverse=True)[:count]
        result.append(entries + [(-1.0, 0)] * (count - len(entries)))
    return result


@pytest.mark.parametrize(
    ("tokens", "channels", "count"), [(7, 5, 4), (1, 3, 3), (2, 3, 20), (30, 2, 20), (40, 64, 20)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_select_sinks_finds_the_largest_values(tokens, channels, count, padded):
    torch.manual_seed(tokens)
    residual = torch.randn(3, tokens, channels)
    valid = None
    if padded:
        valid = torch.ones(3, tokens, dtype=torch.bool)
        valid[1, : tokens // 2] = False
        valid[2] = False
        residual[1, : tokens // 2] *= 1000.0
    scores, chosen = select_sinks(residual, valid, count)
    assert scores.shape == chosen.shape == (3, count)
    assert (scores.dtype, chosen.dtype) == (torch.float32, torch.int64)
    for b, expected in enumerate(select_by_sorting(residual, valid, count)):
        assert list(zip(scores[b].tolist(), chosen[b].tolist(), strict=True)) == expected


def test_select_sinks_ranks_a_16_bit_residual_by_its_own_values():
    residual = torch.zeros(1, 4, 6, dtype=torch.bfloat16)
    residual[0, 2, 1], residual[0, 0, 5], residual[0, 3, 3] = -100.0, 7.0, 50.0
    scores, chosen = select_sinks(residual, None, 3)
    assert scores.tolist() == [[100.0, 50.0, 7.0]]
    assert chosen.tolist() == [[2, 3, 0]]


def test_take_tokens_reads_each_sequence_at_its_own_slots():
    x = torch.randn(2, 3, 5, 4)
    out = take_tokens(x, torch.tensor([[4, 0], [1, 1]]))
    assert out.shape == (2, 3, 2, 4)
    for b, slots in enumerate(([4, 0], [1, 1])):
        for i, slot in enumerate(slots):
            assert torch.equal(out[b, :, i], x[b, :, slot])


def test_restore_sinks_replaces_rows_and_copies_the_rest():
    x, exact = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 4).double()
    exact[1, :, 3] = exact[1, :, 0]  # the same token twice
    slots = torch.tensor([[4, -1, 0, 5], [2, 100, -7, 2]])
    before = x.clone()
    expected = x.clone()
    for b, row in enumerate(slots.tolist()):
        for i, slot in enumerate(row):
            if 0 <= slot < 5:
                expected[b, :, slot] = exact[b, :, i].float()
    out = restore_sinks(x, exact, slots)
    assert torch.equal(out, expected)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


def test_restore_sinks_ignores_rows_of_nan_outside():
    x = torch.randn(1, 2, 5, 4)
    out = restore_sinks(x, torch.full((1, 2, 2, 4), torch.nan), torch.tensor([[-1, 5]]))
    assert torch.equal(out, x)


def test_sink_ops_refuse_what_does_not_fit():
    with pytest.raises(ConfigError, match="count is 0"):
        select_sinks(torch.zeros(1, 2, 3), None, 0)
    with pytest.raises(ConfigError, match=r"valid is torch\.int64"):
        select_sinks(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match="rows of exact and slots are 2 and 1"):
        restore_sinks(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 4), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"take_tokens: slots is torch\.int32"):
        take_tokens(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ConfigError, match="heads of both tensors are 2 and 1"):
        restore_sinks(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))
