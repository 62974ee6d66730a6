"""Windows, scores and bytes against computations that share no code with them."""

from __future__ import annotations

import copy
import math
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel

import rotatekv_fx
from rotatekv_fx import RotateKVConfig
from rotatekv_fx.errors import CalibrationError, InputError, StateError
from rotatekv_fx.evaluate import (
    CalibrationSource,
    bits_per_element,
    cache_elements,
    check_context,
    continue_greedily,
    cut_windows,
    encode,
    evaluate,
    load_model,
    load_tokenizer,
    read_text,
    score,
    sixteen_bit_nbytes,
    start_tokens,
)


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    return load_model(str(tiny_model_folder), "float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(str(tiny_model_folder))


# Text and windows


def test_windows_are_consecutive_and_begin_with_the_start_token():
    cut = cut_windows(range(10, 21), context=4, start=[1])
    assert [w.tolist() for w in cut] == [[[1, 10, 11, 12]], [[1, 13, 14, 15]], [[1, 16, 17, 18]]]
    assert all(w.dtype == torch.int64 for w in cut)


def test_windows_without_a_start_token_hold_text_only():
    assert [w.tolist() for w in cut_windows(range(6), context=3)] == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize(
    ("ids", "context", "least", "told"),
    [(5, 8, 1, "5 tokens"), (20, 1, 1, "context is 1"), (20, 8, 3, "2 windows of context 8, but 3")],
)
def test_windows_that_cannot_be_cut_are_refused(ids, context, least, told):
    with pytest.raises(InputError, match=told):
        cut_windows(range(ids), context, [1], least)


def test_start_tokens_follow_the_tokenizer(tokenizer):
    assert start_tokens(tokenizer) == [1]
    assert start_tokens(types.SimpleNamespace(bos_token_id=None)) == []


def test_encoding_adds_no_special_token(tokenizer):
    ids = encode(tokenizer, "The river")
    assert tokenizer.decode(ids) == "The river"
    assert not {0, 1, 2} & set(ids)


def test_unusable_texts_are_refused(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, told in ((tmp_path / "absent.txt", "No such file"), (empty, "is empty"), (binary, "not UTF-8")):
        with pytest.raises(InputError, match=told) as caught:
            read_text(path)
        assert str(path) in str(caught.value)


# Scores


def test_scores_agree_with_numpy():
    generator = np.random.default_rng(0)
    p_logits = generator.normal(size=(300, 50)) * 3  # longer than one chunk
    q_logits = p_logits + generator.normal(size=p_logits.shape)
    targets = generator.integers(0, 50, 300)
    p = np.exp(p_logits) / np.exp(p_logits).sum(-1, keepdims=True)
    q = np.exp(q_logits) / np.exp(q_logits).sum(-1, keepdims=True)

    found = score(torch.tensor(p_logits).float(), torch.tensor(q_logits).float(), torch.tensor(targets))

    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert found.nll == pytest.approx(-np.log(q[np.arange(300), targets]).mean(), rel=1e-5)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).mean()


def test_tokens_that_neither_model_can_write_add_nothing_to_the_divergence():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert score(logits, logits, torch.tensor([0])).kl == 0.0


def test_a_loss_that_is_not_finite_is_an_error():
    logits = torch.zeros(1, 3)
    with pytest.raises(StateError, match="nan"):
        score(logits, logits * torch.nan, torch.tensor([0]))


def test_recipe_none_scores_as_the_model_itself(tiny):
    torch.manual_seed(0)
    windows = [torch.randint(3, 8192, (1, 40)) for _ in range(3)]
    config = RotateKVConfig(recipe="none")
    before = copy.deepcopy(tiny.state_dict())
    seen = []

    figures = evaluate(
        tiny,
        {config: rotatekv_fx.transform(copy.deepcopy(tiny), config)},
        windows,
        progress=lambda done, total: seen.append((done, total)),
    )

    losses = [tiny(w, labels=w).loss.item() for w in windows]
    (row,) = figures["rows"]
    assert figures["untransformed_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert row["per_window"]["nll"] == pytest.approx(losses, rel=1e-5)
    assert row["kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["agreement"] == 1.0
    assert row["tokens"] == 3 * 39
    assert row["key_bits"] == row["value_bits"] == 32
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), tiny.state_dict().values(), strict=True))


@pytest.mark.slow
def test_recipe_paper_on_the_reference_model(reference_model, repository):
    """A short form of the protocol of the README; the bounds hold the measured figures with some room."""
    data = repository / "benchmarks" / "data"
    tokenizer = load_tokenizer(str(repository / "benchmarks" / "reference_model"))
    text = read_text(data / "wikitext-2-raw-test.txt")[:6_000]
    cut = cut_windows(encode(tokenizer, text), 512, start_tokens(tokenizer))[:1]
    calibration_text = read_text(data / "calibration.txt")[:4_000]
    windows = cut_windows(encode(tokenizer, calibration_text), 256, start_tokens(tokenizer))[:3]
    statistics = rotatekv_fx.calibrate(reference_model, windows, progress=lambda done, total: None)
    config = RotateKVConfig(recipe="paper")
    packed = rotatekv_fx.transform(copy.deepcopy(reference_model), config, statistics)

    figures = evaluate(reference_model, {config: packed}, cut)

    (row,) = figures["rows"]
    assert 0.3 < row["kl"] < 0.8
    assert 0.5 < row["agreement"] < 0.75
    assert 1.1 < row["perplexity"] / figures["untransformed_perplexity"] < 1.6
    assert 2.25 < row["bits_per_element"] < 3.1


# Bytes


def test_bits_per_element_count_what_the_cache_holds(tiny):
    output = tiny(torch.ones(2, 24, dtype=torch.int64), use_cache=True)
    sites = rotatekv_fx.inspect_model(tiny).sites
    assert cache_elements(sites, 24, batch=2) == 2 * (2 * 2 * 32) * 24 * 2  # layers, K and V, batch
    assert bits_per_element(output.past_key_values, sites, 24, batch=2) == 32.0
    assert sixteen_bit_nbytes(sites, 24, batch=2) == 2 * cache_elements(sites, 24, batch=2)


def test_a_continuation_is_the_models_own(tiny, tokenizer):
    sites = rotatekv_fx.inspect_model(tiny).sites
    found = continue_greedily(tiny, tokenizer, sites, "The river", 5)
    ids = torch.tensor([[1, *encode(tokenizer, "The river")]])
    expected = ids
    for _ in found["new_tokens"]:
        expected = torch.cat([expected, tiny(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert found["new_tokens"] == expected[0, ids.shape[1] :].tolist()
    assert found["cache_tokens"] == expected.shape[1] - 1
    assert found["cache_bytes"] == 2 * found["cache_bytes_16bit"]  # a float32 model's own cache
    with pytest.raises(InputError, match="at most 512"):
        continue_greedily(tiny, tokenizer, sites, "The river", 512)


# Calibration sources


def test_calibration_sources_say_what_they_are(tiny, tokenizer, tmp_path, repository):
    text = repository / "benchmarks" / "data" / "calibration.txt"
    source = CalibrationSource.open(text=text)
    seen = []
    statistics, origin = source.collect(tiny, tokenizer, 32, 3, lambda done, total: seen.append(total))
    assert origin == {"source": "text", "file": str(text), "context": 32, "windows": 3}
    assert seen[-1] == 3

    saved = tmp_path / "calibration.safetensors"
    statistics.save(saved)
    loaded, origin = CalibrationSource.open(file=saved).collect(tiny, tokenizer)
    assert origin == {"source": "file", "file": str(saved)}
    assert torch.equal(loaded.layers[0].key_sum, statistics.layers[0].key_sum)

    with pytest.raises(InputError, match="one of the two"):
        CalibrationSource.open(saved, text)
    with pytest.raises(CalibrationError, match="absent"):
        CalibrationSource.open(file=tmp_path / "absent.safetensors")


# Models


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was looked for")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.parametrize("name", ["./absent", "/absent", "a/b/c", "absent/", "~absent", "", "local/absent"])
def test_paths_that_lead_nowhere_never_reach_the_hub(name, no_hub, tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="There is no folder"):
        load_model(name)


def test_places_without_a_model_are_refused(no_hub, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no config"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        load_model(str(tmp_path / "file"))


def test_unknown_dtypes_and_devices_are_refused(no_hub, tiny_model_folder):
    with pytest.raises(InputError, match="'float17'"):
        load_model(str(tiny_model_folder), "float17")
    with pytest.raises(InputError, match="'abacus'"):
        load_model(str(tiny_model_folder), device="abacus")


def test_damaged_and_incomplete_checkpoints_are_refused(tiny_model_folder, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((tiny_model_folder / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="Cannot load"):
        load_model(str(damaged))

    bare = tmp_path / "bare"
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    LlamaModel(config).save_pretrained(bare)
    with pytest.raises(InputError, match="lm_head"):
        load_model(str(bare))


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder"):
        load_model(str(tmp_path))


def test_sequences_longer_than_the_model_takes_are_refused(tiny):
    check_context(tiny, 512)
    with pytest.raises(InputError, match="513"):
        check_context(tiny, 513)
