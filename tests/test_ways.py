"""Ways to generate on a packed cache at 2 bits: each gives what plain decoding of the same model gives.

`test_generate.py` compares recipe `none` with the untransformed model; here codes are at stake.
"""

import copy

import pytest
import torch
import zoo
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx.errors import StateError

NEW = 16
CASES = {
    "paper": ("llama", "paper", {"sinks": 0}),
    "paper, window": ("llama", "paper", {"sinks": 0, "window": 5, "slack": 6}),
    "centered": ("llama", "centered", {"sinks": 0, "window": 5, "slack": 6}),
    "centered, sliding": ("gemma2", "centered", {"sinks": 0, "window": 5, "slack": 6}),
}
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CASES)
def packed(request):
    name, recipe, settings = CASES[request.param]
    return zoo.packed(name, recipe, **settings)


def one_prompt():
    """A prompt that repeats itself, so that looking up drafts in it finds some."""
    once = zoo.prompt(batch=1, padding=())[0]
    return torch.cat([once, once[:, :9]], 1)


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})


class Counts:
    """How often a cache was cropped, and by how many tokens in all."""

    def __init__(self, monkeypatch):
        self.times, self.tokens = 0, 0
        crop = DynamicCache.crop

        def counted(cache, number):
            before = cache.get_seq_length()
            crop(cache, number)
            self.times, self.tokens = self.times + 1, self.tokens + before - cache.get_seq_length()

        monkeypatch.setattr(DynamicCache, "crop", counted)


def test_prompt_lookup(packed, monkeypatch):
    ids = one_prompt()
    expected = generate(packed, ids)
    counts = Counts(monkeypatch)
    assert torch.equal(generate(packed, ids, prompt_lookup_num_tokens=3), expected)
    assert counts.tokens > 0


@pytest.mark.parametrize("drafts", [2, 6])
def test_assisted_by_a_model_that_is_often_wrong(packed, monkeypatch, drafts):
    """Drafts are appended and cropped; no draft is longer than the slack."""
    ids = one_prompt()
    expected = generate(packed, ids)
    assistant = copy.deepcopy(zoo.shared("llama"))
    assistant.generation_config.num_assistant_tokens = drafts
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    counts = Counts(monkeypatch)
    assert torch.equal(generate(packed, ids, assistant_model=assistant), expected)
    assert counts.tokens > drafts


def test_assisted_by_the_same_weights_at_two_bits(packed):
    """The usual pair: a packed draft model for an exact one; the exact one's tokens come out."""
    original = rk.restore(copy.deepcopy(packed))
    ids = one_prompt()
    assert torch.equal(generate(original, ids, assistant_model=packed), generate(original, ids))


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming(packed):
    ids, streamer = one_prompt(), Collected()
    expected = generate(packed, ids)
    assert torch.equal(generate(packed, ids, streamer=streamer), expected)
    assert streamer.ended
    assert streamer.tokens == expected[0].tolist()


def test_several_turns_on_one_cache(packed):
    """Each turn continues on the cache of the last one, as if all had been read at once."""
    ids, cache = one_prompt(), None
    for turn in range(3):
        output = generate(packed, ids, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(output.sequences, generate(packed, ids))
        cache = output.past_key_values
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        more = zoo.prompt(batch=1, length=4, padding=(), seed=turn + 5)[0]
        ids = torch.cat([output.sequences, more], 1)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_prefix_that_is_read_once(packed, make):
    """The cache of a prefix is copied for each continuation."""
    prefix = one_prompt()
    options = {"config": packed.config} | ({"max_cache_len": 60} if make is StaticCache else {})
    cache = make(**options)
    with torch.no_grad():
        packed(prefix, past_key_values=cache)
    for seed in range(2):
        ids = torch.cat([prefix, zoo.prompt(batch=1, length=3, padding=(), seed=seed)[0]], 1)
        found = generate(packed, ids, past_key_values=copy.deepcopy(cache), disable_compile=True)
        assert torch.equal(found, generate(packed, ids))
    assert int(cache.get_seq_length()) == prefix.shape[1]


def test_a_prefix_for_a_whole_batch(packed):
    prefix, cache = one_prompt(), DynamicCache(config=packed.config)
    with torch.no_grad():
        packed(prefix, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    ends = zoo.prompt(length=4, padding=(), seed=8)[0]
    ids = torch.cat([prefix.expand(3, -1), ends], 1)
    assert torch.equal(generate(packed, ids, past_key_values=cache), generate(packed, ids))


def test_inference_mode(packed):
    ids = one_prompt()
    expected = generate(packed, ids)
    with torch.inference_mode():
        assert torch.equal(generate(packed, ids), expected)
        assert torch.equal(
            generate(packed, ids, cache_implementation="static", disable_compile=True), expected
        )


def test_gradients_are_not_needed_and_do_not_hurt(packed):
    ids = one_prompt()
    with torch.no_grad():
        expected = packed(ids).logits
    assert torch.equal(packed(ids).logits, expected)


def test_sampling_is_that_of_the_logits(packed):
    ids, mask = zoo.prompt()
    tokens = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 20, "temperature": 0.7, "disable_compile": True}
        tokens.append(
            packed.generate(ids, attention_mask=mask, cache_implementation=cache, **{**OPTIONS, **options})
        )
    assert torch.equal(*tokens)


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_with_sequences_returned(packed, beams):
    """Several returned sequences are the best ones of the same search."""
    ids = one_prompt()
    best = generate(packed, ids, num_beams=beams)
    several = generate(packed, ids, num_beams=beams, num_return_sequences=beams)
    assert several.shape[0] == beams
    assert torch.equal(several[:1], best)


def test_embeddings_in_place_of_tokens(packed):
    ids = one_prompt()
    embeddings = packed.get_input_embeddings()(ids).detach()
    found = packed.generate(inputs_embeds=embeddings, **OPTIONS)
    assert torch.equal(found, generate(packed, ids)[:, ids.shape[1] :])


class OwnCache(DynamicCache):
    """A cache class of someone's own."""


def test_a_cache_of_an_unknown_kind(packed):
    with pytest.raises(StateError, match="the cache is a OwnCache; use a DynamicCache or a StaticCache"):
        generate(packed, one_prompt(), past_key_values=OwnCache(config=packed.config))
