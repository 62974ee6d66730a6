"""Cache layers with a state-space model's states beside keys and values; the states are taken along."""

import copy

import pytest
import torch
import zoo
from transformers import DynamicCache, StaticCache
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from benchmarks import tiny_models
from rotatekv_fx.cache import PackedLayer
from rotatekv_fx.errors import StateError

CLOSE = {"rtol": 0, "atol": 1e-4}  # a model with a cache of its own is no closer to itself without
# One whose mixer runs beside its attention, and one whose mixers run in layers before it.
NAMES = ("falcon_h1", "zamba")


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """(untransformed, transformed with recipe none)."""
    model = tiny_models.build(request.param)
    return model, rk.transform(copy.deepcopy(model), rk.RotateKVConfig(recipe="none"))


def ids(batch=2, length=18):
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, cache=None):
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits


def test_batch_operations_take_the_states_along(pair):
    """Transformers' layers with states alone know only how to reorder."""
    model, packed = pair
    cache, tokens = DynamicCache(config=model.config), ids(3)
    logits(packed, tokens, cache)
    orders = [(cache.reorder_cache, torch.tensor([2, 0, 1]))]
    if all(isinstance(layer, PackedLayer) for layer in cache.layers):
        orders += [(lambda index: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2]))]
        orders += [(cache.batch_select_indices, torch.tensor([5, 1, 2]))]
    for operation, index in orders:
        operation(index)
        tokens = torch.cat([tokens[index], torch.full((len(index), 1), 7)], 1)
        found, expected = logits(packed, tokens[:, -1:], cache), logits(model, tokens)[:, -1:]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_forgets_the_states(pair, kind):
    model, packed = pair
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=32)
    )
    for seed in (0, 1):
        tokens = ids() + seed
        found = [logits(packed, tokens[:, :12], cache)]
        found += [logits(packed, tokens[:, i : i + 1], cache) for i in range(12, 18)]
        torch.testing.assert_close(torch.cat(found, 1), logits(model, tokens), **CLOSE)
        cache.reset()


def test_the_states_are_counted(pair):
    model, packed = pair
    found, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    logits(packed, ids(), found)
    logits(model, ids(), expected)
    assert sum(isinstance(layer, PackedLayer) for layer in found.layers) == 2
    states = [t for layer in expected.layers for t in getattr(layer, "conv_states", {}).values()]
    states += [t for layer in expected.layers for t in getattr(layer, "recurrent_states", {}).values()]
    assert rk.cache_nbytes(found) > sum(t.nbytes for t in states if t is not None) > 0


def test_a_state_cannot_be_taken_back(pair):
    model, packed = pair
    cache = DynamicCache(config=model.config)
    logits(packed, ids(), cache)
    assert not any(layer.is_croppable for layer in cache.layers if isinstance(layer, PackedLayer))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_sinks_and_a_window_beside_the_states(pair):
    model, _ = pair
    calibration = rk.calibrate(model, ids(3, 40).split(1), progress=zoo.quiet)
    config = rk.RotateKVConfig(key_bits=8, value_bits=8, window=4, slack=2, sinks=2)
    packed = rk.transform(copy.deepcopy(model), config, calibration)
    found = packed.generate(ids(), max_new_tokens=6, do_sample=False, attention_mask=torch.ones(2, 18).long())
    assert found.shape == (2, 24)
    cache = DynamicCache(config=model.config)
    steps = [logits(packed, ids()[:, :12], cache)]
    steps += [logits(packed, ids()[:, i : i + 1], cache) for i in range(12, 18)]
    assert zoo.relative(torch.cat(steps, 1), logits(model, ids())) < 0.1


def test_a_graph_without_the_states_is_refused(tmp_path):
    packed = rk.transform(tiny_models.build("falcon_h1"), rk.RotateKVConfig(recipe="none"))
    with pytest.raises(StateError, match="layer 0 keeps a state beside keys and values"):
        rk.export_onnx(packed, tmp_path / "graph")
