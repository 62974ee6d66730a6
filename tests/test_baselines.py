"""KIVI, round-to-nearest and QuaRot against plain re-computations of what their papers describe."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from rotatekv_fx import RotateKVConfig, cache_nbytes, inspect_model, transform
from rotatekv_fx.errors import ConfigError, InputError, StateError
from rotatekv_fx.evaluate import load_model
from rotatekv_fx.evaluate.baselines import (
    KiviLayer,
    evaluate_caches,
    held_nbytes,
    kivi_cache,
    quantized_cache,
)


@pytest.fixture(scope="module")
def tiny_model(tiny_model_folder):
    return load_model(str(tiny_model_folder), "float32")


def rounded(x, bits):
    """Round-to-nearest of each row [..., g]: q = round((x - min) / s), s = (max - min) / (2^b - 1)."""
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)).half().float()
    return low + scale * ((x - low) / scale).round().clamp(0, 2**bits - 1)


def kivi_reads(keys, values, bits, group, residual):
    """The paper's algorithm in one go, token group by token group and head-major channel group by group."""
    keys, values = keys.half().float(), values.half().float()
    tokens, block = keys.shape[2], residual or group
    read_keys, read_values = keys.clone(), values.clone()
    for start in range(0, tokens // block * block, group):
        of_channel = keys[:, :, start : start + group].mT
        read_keys[:, :, start : start + group] = rounded(of_channel, bits).mT
    for token in range(max(0, tokens - residual)):
        row = values[:, :, token].flatten(1).unflatten(1, (-1, group))
        read_values[:, :, token] = rounded(row, bits).flatten(1).unflatten(1, values[:, :, token].shape[1:])
    return read_keys, read_values


def some_tokens(tokens, heads=2, dim=64):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, heads, tokens, dim, generator=generator)
    return keys * torch.linspace(0.1, 5, dim), values


@pytest.mark.parametrize(("bits", "group", "residual"), [(2, 32, 0), (4, 16, 32), (2, 128, 0), (2, 32, 64)])
def test_kivi_reads_what_the_paper_describes(bits, group, residual):
    keys, values = some_tokens(150)
    read = KiviLayer(bits, group, residual).update(keys, values)
    expected = kivi_reads(keys, values, bits, group, residual)
    for got, want in zip(read, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        exact = keys if want is expected[0] else values
        assert (got - exact).norm() > 0.02 * exact.norm()


def test_kivi_reads_the_same_after_any_chunking():
    keys, values = some_tokens(150)
    whole, pieces = KiviLayer(2, 32, 64), KiviLayer(2, 32, 64)
    expected = whole.update(keys, values)
    for start, end in ((0, 70), (70, 71), (71, 140), (140, 150)):
        read = pieces.update(keys[:, :, start:end], values[:, :, start:end])
    for got, want in zip(read, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert pieces.get_seq_length() == 150
    assert pieces.get_mask_sizes(3) == (153, 0)


def test_kivi_bytes_are_codes_scales_minima_and_exact_tokens(tiny_model):
    cache = kivi_cache(tiny_model, 2, 32)
    tiny_model(input_ids=torch.arange(100)[None], past_key_values=cache)
    heads, dim = 2, 32
    a_layer = 96 * heads * dim * 3 / 8 + 4 * heads * dim * 2 + 100 * heads * dim * 3 / 8
    assert held_nbytes(cache) == 2 * a_layer
    exact = DynamicCache()
    tiny_model(input_ids=torch.arange(100)[None], past_key_values=exact)
    assert held_nbytes(exact) == 2 * 2 * 100 * heads * dim * 2  # float32, counted as 16 bits


def test_kivi_row_agrees_with_a_direct_forward(tiny_model):
    windows = [torch.arange(i, i + 64)[None] for i in (3, 400, 900)]
    sites = inspect_model(tiny_model).sites

    def kivi():
        return kivi_cache(tiny_model, 2, 32)

    (row,) = evaluate_caches(tiny_model, {"kivi": kivi}, windows, sites, batch=2)
    kl = []
    for window in windows:
        with torch.no_grad():
            p = tiny_model(input_ids=window).logits[0, :-1].log_softmax(-1)
            q = tiny_model(input_ids=window, past_key_values=kivi()).logits[0, :-1].log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert row["per_window"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert row["kl"] > 1e-3
    assert row["bits_per_element"] == pytest.approx(3.0)
    assert row["tokens"] == 3 * 63


def test_exact_recent_tokens_lose_less_when_fed_token_by_token(reference_model):
    windows = [torch.arange(100, 164)[None]]
    sites = inspect_model(reference_model).sites
    makers = {
        "none": lambda: kivi_cache(reference_model, 2, 16),
        "residual": lambda: kivi_cache(reference_model, 2, 16, 32),
    }
    none, residual = evaluate_caches(reference_model, makers, windows, sites, step=1)
    assert residual["kl"] < 0.7 * none["kl"]
    assert residual["bits_per_element"] > none["bits_per_element"]


def test_kivi_refuses_what_it_does_not_serve(tiny_model):
    with pytest.raises(ConfigError, match="residual is 40"):
        kivi_cache(tiny_model, 2, 32, 40)
    with pytest.raises(StateError, match="comparisons only"):
        kivi_cache(tiny_model).layers[0].crop(-1)
    sliding = copy.deepcopy(tiny_model)
    sliding.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(InputError, match="sliding_attention"):
        kivi_cache(sliding)


def attended_by(model, recipe, ids):
    """Keys and values that each layer of a transformed model reads, with what the untransformed one
    cached.
    """
    exact = DynamicCache()
    model(input_ids=ids, past_key_values=exact)
    packed = transform(copy.deepcopy(model), RotateKVConfig(recipe=recipe, window=0))
    cache = DynamicCache()
    packed(input_ids=ids, past_key_values=cache)
    layer, own = cache.layers[0], exact.layers[0]
    keys, values = layer.history.read()
    runtime = packed.model.layers[0].self_attn.rotatekv
    return runtime.from_codes(keys, ()), values, own.keys, own.values


def by_token(x):
    return x.transpose(1, 2).flatten(2)


def test_round_to_nearest_is_per_token_after_rope(tiny_model):
    """The tiny model's 2 heads of 32 channels are one group of 64."""
    with torch.no_grad():
        keys, values, exact_keys, exact_values = attended_by(tiny_model, "rtn", torch.arange(1, 41)[None])
    for got, exact in ((keys, exact_keys), (values, exact_values)):
        torch.testing.assert_close(by_token(got), rounded(by_token(exact), 2), rtol=2e-3, atol=2e-3)


def test_quarot_rotates_each_head_after_rope(tiny_model):
    """x^ = H Q(H x): z = round(-0.8 min / s), s = 0.8 (max - min) / 3, q = round(x / s) + z in 0..3."""
    with torch.no_grad():
        keys, values, exact_keys, exact_values = attended_by(tiny_model, "quarot", torch.arange(1, 41)[None])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    h = torch.ones(1, 1)
    while h.shape[0] < 32:
        h = torch.kron(h, signs)
    h = h / 32**0.5

    def quantized(x):
        x = by_token(x)
        high, low = 0.8 * x.amax(-1, keepdim=True), 0.8 * x.amin(-1, keepdim=True)
        scale = ((high - low) / 3).half().float()
        zero = (-low / scale).round()
        read = scale * (((x / scale).round() + zero).clamp(0, 3) - zero)
        return read.unflatten(2, (2, 32)).transpose(1, 2)

    torch.testing.assert_close(keys, quantized(exact_keys @ h) @ h, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(values, quantized(exact_values @ h), rtol=2e-3, atol=2e-3)  # o_proj undoes H


@pytest.mark.parametrize("recipe", ["rtn", "quarot"])
def test_baseline_recipes_hold_codes_alone(tiny_model, recipe):
    packed = transform(copy.deepcopy(tiny_model), RotateKVConfig(recipe=recipe, window=0, sinks=20))
    cache = DynamicCache()
    packed(input_ids=torch.arange(64)[None], past_key_values=cache)
    assert cache_nbytes(cache) * 8 / (2 * 2 * 64 * 64) == 2 + 32 / 64


def test_quantized_cache_names_what_is_missing(tiny_model, monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'rotatekv-fx\[baselines\]'"):
        quantized_cache(tiny_model, "hqq")
    with pytest.raises(InputError, match="'nothing'"):
        quantized_cache(tiny_model, "nothing")


def test_quantized_cache_runs_and_is_counted(tiny_model):
    """96 tokens in steps of 16: each 32 recent ones join the codes, with 16-bit scale and zero a group."""
    pytest.importorskip("hqq")
    windows = [torch.arange(5, 101)[None]]
    sites = inspect_model(tiny_model).sites
    makers = {b: lambda b=b: quantized_cache(tiny_model, "hqq", b, 32, 32) for b in (2, 4)}
    two, four = evaluate_caches(tiny_model, makers, windows, sites, step=16)
    assert 0 < four["kl"] < two["kl"]
    coded, exact = 80 / 96, 16 / 96
    assert two["bits_per_element"] == pytest.approx(coded * (2 + 32 / 32) + exact * 16)
    assert four["bits_per_element"] == pytest.approx(coded * (4 + 32 / 32) + exact * 16)
