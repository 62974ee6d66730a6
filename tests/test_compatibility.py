"""The compatibility table: its recorded form is whole, and a fast subset is what it says."""

import collections
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from benchmarks import compatibility, tiny_models
from rotatekv_fx.errors import MatchError

RECORDED = Path(compatibility.__file__).parent / "results" / "compatibility.json"
# One of each kind: plain, soft-cap and sliding layers, fused QKV, experts, hybrids, multimodal, inline with a
# table over positions, two attentions; latent, an indexer, keys handed on, several layers a module.
SUBSET = (
    *("qwen3", "gemma2", "gpt_neox", "mixtral", "bamba", "falcon_h1", "got_ocr2", "gpt_neo", "diffllama"),
    *("deepseek_v3", "deepseek_v32", "gemma3n_text", "hrm_text"),
)


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def rows(recorded, status):
    return [row for row in recorded["rows"] if row["status"] == status]


def test_the_table_is_whole(recorded):
    names = [row["architecture"] for row in recorded["rows"]]
    assert len(set(names)) == len(names)
    if transformers.__version__ == recorded["versions"]["transformers"]:
        assert tuple(names) == tiny_models.architectures()
    assert {row["status"] for row in recorded["rows"]} <= set(compatibility.STATUSES)
    page = compatibility.table(recorded["rows"], recorded["versions"])
    assert RECORDED.with_suffix(".md").read_text(encoding="utf-8") == page


def test_the_docs_list_the_refusals(recorded):
    page = (RECORDED.parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert f"{compatibility.BEGIN}\n\n{compatibility.refusals(recorded['rows'])}\n{compatibility.END}" in page


def test_nothing_in_the_table_is_wrong(recorded):
    assert rows(recorded, "wrong") == []
    assert all(
        row["reasons"] for status in ("refused", "not built", "partly") for row in rows(recorded, status)
    )


def test_enough_architectures_work(recorded):
    works = rows(recorded, "works")
    assert len(works) >= 42
    for row in works:
        assert row["matched"] and not row["rejected"]
        assert row["tokens"]["dynamic"] == row["tokens"]["padded"] == "equal"
        assert all(found == "equal" or "not in transformers" in found for found in row["tokens"].values())
        assert row["packed"]["error"] < compatibility.CLOSE_AT_8_BITS
        assert set(row["dtypes"]) == {"bfloat16", "float16"}
    on_static = [row for row in works if row["tokens"]["static"] == "equal"]
    assert len(on_static) >= 42
    assert sum("DynamicSlidingWindowLayer" in row["layers"] for row in on_static) >= 10
    multimodal = ("gemma3", "got_ocr2", "emu3", "fuyu", "mllama", "phi4_multimodal")
    assert sum(row["architecture"] in multimodal for row in on_static) >= 2


@pytest.mark.parametrize("architecture", SUBSET)
def test_the_table_says_what_is_found(recorded, architecture):
    if architecture not in tiny_models.architectures():
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    found = compatibility.check(architecture, dtypes=())
    (row,) = (row for row in recorded["rows"] if row["architecture"] == architecture)
    assert (found.status, found.matched, found.rejected) == (row["status"], row["matched"], row["rejected"])
    assert found.status in ("works", "refused")


def test_a_large_model_is_no_tiny_one(monkeypatch):
    monkeypatch.setattr(tiny_models, "MOST_PARAMETERS", 1000)
    with pytest.raises(ValueError, match="name its sizes in SIZES or ADJUSTMENTS"):
        tiny_models.build("llama")


def test_a_wrong_model_is_called_wrong(monkeypatch):
    """The table can fail: here the attention forgets its soft-cap, and then the whole cache."""
    understood = rk.capture.understood

    def forgets(arguments):
        arguments.static["scaling"] = 1.0
        return understood(arguments)

    monkeypatch.setattr(rk.capture, "understood", forgets)
    found = compatibility.check("llama", dtypes=())
    assert found.status == "wrong"
    assert "tokens differ: dynamic" in found.reasons


# Modules that a trace would get wrong


class Branches(LlamaAttention):
    """Scales the queries of long inputs."""

    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[1] > 16:
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, **kwargs)


class BranchesBelow(LlamaAttention):
    """Treats single tokens in another way."""

    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[1] < 4:
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, **kwargs)


class HandsOn(LlamaAttention):
    """Leaves something for a later layer of its kind, which writes nothing."""

    def forward(self, hidden_states, **kwargs):
        shared = kwargs.pop("shared")
        if self.layer_idx:
            return shared[0], None
        shared[0] = hidden_states
        return super().forward(hidden_states, **kwargs)


class AsksForTheLength(LlamaAttention):
    """Scales by the number of cached tokens."""

    def forward(self, hidden_states, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return super().forward(hidden_states * (1 + cache.get_seq_length()), **kwargs)


class AsksAfterWriting(LlamaAttention):
    """Asks how long the cache is once its own tokens are in it."""

    def forward(self, hidden_states, **kwargs):
        output, weights = super().forward(hidden_states, **kwargs)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return output * cache.get_seq_length(), weights


class ReadsStates(LlamaAttention):
    """Keeps something in the cache beside keys and values."""

    def forward(self, hidden_states, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if hasattr(cache, "written") and cache.get_conv_state(self.layer_idx) is not None:
            return hidden_states, None
        return super().forward(hidden_states, **kwargs)


class ScalesByThePast(nn.Linear):
    """A projection of queries whose scale grows with the number of tokens before them."""

    def forward(self, x):
        past = 0 if self.cache[0] is None else self.cache[0].get_seq_length(self.layer_idx)
        positions = torch.arange(x.shape[1], device=x.device) + past
        return super().forward(x) * (1 + 0.05 * positions)[:, None]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AsksAfterWriting, "asks the cache for its length after writing to it"),
        (ReadsStates, "asks the cache for more than keys and values"),
        (Branches, "takes another branch where a size leaves 2 to 16"),
        (BranchesBelow, "takes another branch where a size leaves 4 to"),
        (HandsOn, "hands tensors on to later layers through its arguments"),
        (AsksForTheLength, "what it caches depends on how many tokens the cache holds"),
    ],
)
def test_modules_that_a_trace_would_get_wrong_are_refused(kind, reason):
    model, shared = zoo.build("llama", layers=2 if kind is HandsOn else 1), collections.UserDict()
    for block in model.model.layers:
        block.self_attn.__class__ = kind
        if kind is HandsOn:
            block.forward = functools.partial(type(block).forward, block, shared=shared)
    with pytest.raises(MatchError, match=reason):
        rk.transform(model, rk.RotateKVConfig(recipe="none"))


class ScaledQueries(LlamaAttention):
    """Scales queries by the number of tokens before them."""

    def forward(self, hidden_states, **kwargs):
        self.q_proj.cache[0] = kwargs.get("cache", kwargs.get("past_key_values"))
        return super().forward(hidden_states, **kwargs)


def scaled_queries():
    model = zoo.build("llama")
    for i, block in enumerate(model.model.layers):
        block.self_attn.__class__, block.self_attn.q_proj.__class__ = ScaledQueries, ScalesByThePast
        block.self_attn.q_proj.cache, block.self_attn.q_proj.layer_idx = [None], i
    return model


@pytest.mark.parametrize("recipe", ["none", "centered"])
@pytest.mark.parametrize("static", [False, True])
def test_queries_may_depend_on_how_many_tokens_the_cache_holds(recipe, static):
    model = scaled_queries()
    calibration = None if recipe == "none" else zoo.calibrated(model)
    config = rk.RotateKVConfig(recipe=recipe, key_bits=8, value_bits=8, window=4, slack=2, sinks=2)
    packed = rk.transform(scaled_queries(), config, calibration)
    assert rk.report(packed).sites[0].attention == "attend"
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = (
        StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    )
    with torch.no_grad():
        parts = [packed(part, past_key_values=cache).logits for part in ids.split((7, 6, 1, 1, 1, 1, 3), 1)]
        found, expected = torch.cat(parts, 1), model(ids, use_cache=False).logits
    if recipe == "none":
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert zoo.relative(found, expected) < 0.03


def test_one_module_for_several_layers_is_refused():
    model = zoo.build("llama", layers=2)
    first, second = model.model.layers
    shared = first.self_attn

    def forward(hidden_states, **kwargs):
        shared.layer_idx = 1
        result = shared(hidden_states, **kwargs)
        shared.layer_idx = 0
        return result

    second.self_attn.forward = forward
    with pytest.raises(MatchError, match="serves several layers of the cache"):
        rk.transform(model, rk.RotateKVConfig(recipe="none"))


def test_inline_attention_knows_keys_from_new_tokens():
    """gpt_neo cuts its causal table by both numbers; a trace of a prefill alone would take them for one."""
    model = tiny_models.build("gpt_neo")
    assert isinstance(model.transformer.h[0].attn.attention, GPTNeoSelfAttention)
    packed = rk.transform(tiny_models.build("gpt_neo"), rk.RotateKVConfig(recipe="none"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        cache = packed(ids[:, :12]).past_key_values
        found = [packed(ids[:, i : i + 2], past_key_values=cache).logits for i in range(12, 20, 2)]
        torch.testing.assert_close(torch.cat(found, 1), model(ids).logits[:, 12:], rtol=0, atol=2e-5)


def test_inline_attention_over_ordered_columns_refuses_a_window():
    model = tiny_models.build("gpt_neo")
    calibration = rk.calibrate(model, torch.randint(3, 100, (3, 20)).split(1), progress=zoo.quiet)
    with pytest.raises(MatchError, match="no columns for a recent window; use window=0"):
        rk.transform(model, rk.RotateKVConfig(), calibration)
