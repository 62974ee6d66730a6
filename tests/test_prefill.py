"""Prompts through the op `prefill`, as they run on a GPU, against the general path; both in plain torch."""

import pytest
import torch
import zoo
from test_cache import CLOSE_IN_CODES, Sequences, dynamic, next_tokens, run, static
from zoo import one_thread  # noqa: F401

import rotatekv_fx
from rotatekv_fx import ops
from rotatekv_fx.cache import runtime
from rotatekv_fx.cache.kinds import PackedStaticLayer
from rotatekv_fx.cache.layers import PackedLayer

SETTINGS = {
    "window": {"window": 8},
    "no window": {"window": 0},
    "no sinks": {"window": 8, "sinks": 0},
    "8 bits": {"window": 8, "key_bits": 8, "value_bits": 8},
}
SIX_AND_REST = (6, 7, 24)


@pytest.fixture
def calls(monkeypatch):
    """Tokens of each call of `PackedLayer.prefill` since the fixture was made."""
    seen, original = [], PackedLayer.prefill

    def counted(self, query, *rest):
        seen.append(query.shape[2])
        return original(self, query, *rest)

    monkeypatch.setattr(PackedLayer, "prefill", counted)
    return seen


def logits_of(model, sequences, make, stops):
    """Logits of a prompt that is cut at `stops`, and of three more tokens, one at a time."""
    cache, start, found = make(model), 0, []
    for stop in stops:
        found.append(run(model, sequences, cache, start, stop))
        start = stop
    for seed in range(3):
        sequences = sequences.grown(next_tokens(len(sequences.ids), seed=seed))
        found.append(run(model, sequences, cache, start))
        start += 1
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("stops", [(24,), SIX_AND_REST, (20, 24)], ids=str)
@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_op_reads_what_the_general_path_reads(name, make, stops, calls, monkeypatch):
    model = zoo.packed("llama", "centered", **SETTINGS[name])
    sequences = Sequences.prompt(padding=(0, 0, 0))
    expected, plain = logits_of(model, sequences, make, stops)
    assert not calls
    monkeypatch.setattr(runtime, "has_prefill_kernel", lambda query: True)
    found, fused = logits_of(model, sequences, make, stops)
    several = sum(b - a > 1 for a, b in zip((0, *stops), stops, strict=False))
    assert len(calls) == 2 * several
    limit = 1e-4 if name == "8 bits" else CLOSE_IN_CODES
    assert zoo.relative(found, expected) < limit
    for a, b in zip(fused.layers, plain.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        if a.sinks is not None:
            assert torch.equal(a.sinks.tokens, b.sinks.tokens)
        coded = a.get_seq_length() - SETTINGS[name]["window"]
        for one, other in zip(a.history.parts[0], b.history.parts[0], strict=True):
            assert (one[:, :, :coded] == other[:, :, :coded]).float().mean() > 0.98


@pytest.mark.parametrize("make", [dynamic, static])
def test_padded_prompts_take_the_general_path(make, calls, monkeypatch):
    monkeypatch.setattr(runtime, "has_prefill_kernel", lambda query: True)
    model = zoo.packed("llama", "centered", window=8)
    run(model, Sequences.prompt(padding=(0, 4, 9)), make(model))
    assert not calls


@pytest.mark.parametrize(("name", "expected"), [("llama", True), ("gemma2", False)])
def test_the_report_says_where_prompts_run_as_kernels(name, expected, monkeypatch):
    lowered_to = ops.lowered_to
    monkeypatch.setattr(ops, "lowered_to", lambda op, _device: lowered_to(op, "cuda"))
    model = zoo.transformed(zoo.shared(name), "centered", zoo.shared_calibration(name))
    for site in rotatekv_fx.report(model).sites:
        assert site.lowered["decode"] == "triton"
        assert ("prefill" in site.lowered) is expected  # gemma2 caps its scores


def test_the_first_chunk_asks_no_device_how_long_the_cache_is(monkeypatch):
    monkeypatch.setattr(runtime, "has_prefill_kernel", lambda query: True)
    asked, original = [], torch.Tensor.__int__

    def counted(tensor):
        if any(tensor is getattr(layer, "cumulative_length", None) for layer in cache.layers):
            asked.append(tensor)
        return original(tensor)

    model = zoo.packed("llama", "centered", window=8)
    cache, sequences = static(model), Sequences.prompt(padding=(0, 0, 0))
    monkeypatch.setattr(PackedStaticLayer, "_check_fits", lambda self, count: None)  # asks on a CPU only
    monkeypatch.setattr(torch.Tensor, "__int__", counted)
    run(model, sequences, cache, 0, 20)
    assert not asked
    run(model, sequences, cache, 20, 24)
    assert len(asked) == len(cache.layers)
