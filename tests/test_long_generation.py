"""Long generation: the judge's figures are those of the text, and a broken writer shows."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rotatekv_fx import RotateKVConfig, transform
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate import load_model
from rotatekv_fx.evaluate.long_generation import distinct, long_generation, write

PROMPTS = [torch.tensor([[1, 40, 50]]), torch.tensor([[1, 60, 70]])]


@pytest.fixture(scope="module")
def tiny_model(tiny_model_folder):
    return load_model(str(tiny_model_folder), "float32")


def test_distinct_counts_different_ngrams():
    assert distinct([1, 2, 3, 4, 5], 4) == 1.0
    assert distinct([1, 2] * 10, 2) == 2 / 19
    assert distinct([7] * 11, 4) == 1 / 8


def test_perplexity_is_of_the_text_that_was_written(tiny_model):
    (row,) = long_generation(tiny_model, {"own": tiny_model}, PROMPTS, 24, seed=5)
    text = write(tiny_model, torch.cat(PROMPTS), 24, seed=5)
    assert text.shape == (2, 27)
    losses = []
    for tokens in text:
        with torch.no_grad():
            log_p = tiny_model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        losses.append([-log_p[i - 1, tokens[i]].item() for i in range(3, 27)])
    flat = [loss for one in losses for loss in one]
    assert row["perplexity"] == pytest.approx(math.exp(sum(flat) / 48), rel=1e-4)
    last = [loss for one in losses for loss in one[-6:]]
    assert row["last_quarter_perplexity"] == pytest.approx(math.exp(sum(last) / 12), rel=1e-4)
    assert row["interval"][0] < row["perplexity"] < row["interval"][1]
    assert row["divergence"] == pytest.approx(0, abs=1e-5)
    assert row["distinct"] == pytest.approx(sum(distinct(t[3:].tolist()) for t in text) / 2)


def test_same_seed_same_text_and_the_callers_seed_is_left_alone(tiny_model):
    prompts = torch.cat(PROMPTS)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert torch.equal(write(tiny_model, prompts, 8, 1), write(tiny_model, prompts, 8, 1))
    assert not torch.equal(write(tiny_model, prompts, 8, 1), write(tiny_model, prompts, 8, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_writer_that_degenerates_shows(reference_model):
    """Noise on the keys' projections stands for a cache that is too coarse."""
    broken = copy.deepcopy(reference_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in broken.model.layers:
            weight = layer.self_attn.k_proj.weight
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 2)
    rows = long_generation(reference_model, {"own": reference_model, "broken": broken}, PROMPTS, 24)
    own, bad = rows
    assert bad["perplexity"] > 2 * own["perplexity"]


def test_divergence_is_of_the_cache_the_text_was_written_on(reference_model):
    """Token by token on one packed cache, as `generate` reads it; a batch sums in another order, which flips
    single codes of 2 bits.
    """
    packed = transform(
        copy.deepcopy(reference_model),
        RotateKVConfig(recipe="quarot", window=8, slack=0, keep_originals=False),
    )
    (row,) = long_generation(reference_model, {"packed": packed}, PROMPTS, 40, seed=2)
    text = write(packed, torch.cat(PROMPTS), 40, seed=2)
    with torch.no_grad():
        output = packed(input_ids=text[:, :3], use_cache=True)
        logits = [output.logits[:, -1]]
        for i in range(3, 42):
            output = packed(input_ids=text[:, i : i + 1], past_key_values=output.past_key_values)
            logits.append(output.logits[:, -1])
        judge = reference_model(input_ids=text).logits[:, 2:-1].log_softmax(-1)
    own = torch.stack(logits, 1).log_softmax(-1)
    gaps = (own - judge).gather(-1, text[:, 3:, None])[..., 0]
    assert row["divergence"] == pytest.approx(gaps.mean().item(), abs=0.01)
    assert row["last_quarter_divergence"] == pytest.approx(gaps[:, -10:].mean().item(), abs=0.02)
    low, high = row["divergence_interval"]
    assert low < row["divergence"] < high and row["divergence"] > 0.05


def test_no_prompts_and_too_long_texts_are_refused(tiny_model):
    with pytest.raises(InputError, match="no prompts"):
        long_generation(tiny_model, {}, [])
    with pytest.raises(InputError, match="at most 512"):
        long_generation(tiny_model, {"own": tiny_model}, PROMPTS, 600)
