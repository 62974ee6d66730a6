"""`generate` on transformed models: recipe `none` gives the untransformed model's tokens on any cache."""

import copy

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk

NEW = 12
MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 5},
}
ARCHITECTURES = (*zoo.DECODERS, "gptj")
SLIDING = {"mistral": (0, 1), "gemma2": (0,), "gpt_oss": (0,)}
# Their layers are alike, and tracing takes long.
ONE_LAYER = ("qwen2", "phi3", "gpt_neox", "falcon", "olmo2", "cohere", "glm", "gptj")


def generate(model, **options):
    ids, mask = zoo.prompt()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)


def logits(model):
    ids, mask = zoo.prompt()
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=zoo.positions_of(mask)).logits


class Pair:
    """An untransformed model, its transformed copy, and what both generate, computed once."""

    def __init__(self, name):
        layers = 1 if name in ONE_LAYER else 2
        self.name, self.original = name, zoo.shared(name, layers)
        self.transformed = zoo.packed(name, "none", layers)
        self.outputs = {}

    def generated(self, side, mode):
        if (side, mode) not in self.outputs:
            self.outputs[side, mode] = generate(getattr(self, side), **MODES[mode])
        return self.outputs[side, mode]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    return Pair(request.param)


@pytest.mark.parametrize("mode", MODES)
def test_recipe_none_reproduces_the_tokens(pair, mode):
    found, expected = (pair.generated(side, mode).sequences for side in ("transformed", "original"))
    assert found.shape == (3, zoo.prompt()[0].shape[1] + NEW)
    assert torch.equal(found, expected)


def test_the_tokens_compared_are_worth_comparing(pair):
    prompt = zoo.prompt()[0].shape[1]
    new = pair.generated("original", "dynamic").sequences[:, prompt:]
    assert len({tuple(row.tolist()) for row in new}) == 3
    assert new.unique().numel() > NEW
    assert prompt > zoo.WINDOW


def test_the_architecture_reads_its_context(pair):
    """Otherwise a broken cache would not show."""
    ids, _ = zoo.prompt(padding=(0, 0, 0))
    other = ids.clone()
    other[:, 7:-1] = zoo.prompt(padding=(0, 0, 0), seed=1)[0][:, 7:-1]
    with torch.no_grad():
        first, second = (pair.original(i).logits[:, -1] for i in (ids, other))
    assert zoo.relative(second, first) > 0.5


def test_logits_are_those_of_the_untransformed_model(pair):
    torch.testing.assert_close(logits(pair.transformed), logits(pair.original), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("mode", "full", "sliding"),
    [
        ("dynamic", "PackedDynamicLayer", "PackedSlidingLayer"),
        ("static", "PackedStaticLayer", "PackedStaticSlidingLayer"),
    ],
)
def test_packed_layers_are_in_the_returned_cache(pair, mode, full, sliding):
    packed, own = (pair.generated(side, mode).past_key_values for side in ("transformed", "original"))
    expected = [sliding if layer in SLIDING.get(pair.name, ()) else full for layer in range(len(own.layers))]
    assert [type(layer).__name__ for layer in packed.layers] == expected
    assert packed.is_sliding == own.is_sliding
    assert packed.is_compileable == own.is_compileable
    assert [int(x.get_seq_length()) for x in packed.layers] == [int(x.get_seq_length()) for x in own.layers]
    for count in (1, 4):
        sizes = [layer.get_mask_sizes(count) for layer in own.layers]
        assert [layer.get_mask_sizes(count) for layer in packed.layers] == sizes


def test_attention_was_lowered_as_reported(pair):
    attend = pair.name not in zoo.INLINE
    for site in rk.report(pair.transformed).sites:
        assert site.attention == ("attend" if attend else "inline")
        assert site.passes["lower_attention"] == {"attend": int(attend), "inline": int(not attend)}
        assert ("attend" in site.lowered) == attend
        assert set(site.lowered.values()) == {"reference"}


class Recorder(TorchDispatchMode):
    """Notes which ops run."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_reported_ops_run_once_a_layer(pair):
    ids, _ = zoo.prompt(padding=(0, 0, 0))
    with torch.no_grad(), Recorder() as recorder:
        pair.transformed(ids)
    attended = recorder.called.count("rotatekv.attend.default")
    assert attended == (0 if pair.name in zoo.INLINE else len(rk.report(pair.transformed).sites))
    assert not any("rotatekv_capture" in op for op in recorder.called)


def test_restored_copy_generates_and_gives_the_original_logits(pair):
    restored = rk.restore(copy.deepcopy(pair.transformed))
    assert torch.equal(logits(restored), logits(pair.original))
    found = generate(restored, **MODES["static"]).sequences
    assert torch.equal(found, pair.generated("original", "static").sequences)


# Ways to generate beyond the four above: one architecture of each kind suffices.


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def few(request):
    return Pair(request.param)


def both(pair, **options):
    return [generate(model, **options).sequences for model in (pair.transformed, pair.original)]


@pytest.mark.parametrize("recipe", ["none", "paper"])
def test_a_prompt_without_padding_on_a_static_cache(recipe):
    """transformers then makes no mask, though the fixed buffers have empty columns."""
    original = zoo.shared("llama")
    settings = {} if recipe == "none" else {"key_bits": 8, "value_bits": 8, "sinks": 0}
    ids = zoo.prompt(padding=(0, 0, 0))[0]
    with torch.no_grad():
        cache = StaticCache(config=original.config, max_cache_len=40)
        found = zoo.packed("llama", recipe, **settings)(ids, past_key_values=cache).logits
        assert zoo.relative(found, original(ids).logits) < (2e-5 if recipe == "none" else 0.05)


def test_static_cache_with_chunked_prefill(few):
    found, expected = both(few, **MODES["static"], prefill_chunk_size=5)
    assert torch.equal(found, expected)


def test_prompt_lookup_appends_and_crops(few):
    once = zoo.prompt(batch=1)[0]
    ids = torch.cat([once, once, once[:, :5]], 1)
    options = {"max_new_tokens": 2 * NEW, "do_sample": False, "pad_token_id": 0}
    expected = few.original.generate(ids, **options)
    assert torch.equal(few.transformed.generate(ids, prompt_lookup_num_tokens=3, **options), expected)


def test_assisted_by_another_model(few):
    ids = zoo.prompt(batch=1)[0]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = few.original.generate(ids, **options)
    for model, assistant in ((few.transformed, few.original), (few.original, few.transformed)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


def test_samples_and_several_sequences_a_prompt(few):
    results = []
    for model in (few.transformed, few.original):
        torch.manual_seed(3)
        results.append(generate(model, do_sample=True, num_return_sequences=2).sequences)
    assert results[0].shape[0] == 6
    assert torch.equal(*results)


def test_without_a_cache(few):
    assert torch.equal(*both(few, use_cache=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: DynamicCache(config=model.config),
        lambda model: DynamicCache(),
        lambda model: StaticCache(config=model.config, max_cache_len=40),
    ],
    ids=["dynamic", "dynamic without config", "static"],
)
def test_caches_that_the_caller_makes(few, make):
    caches = [make(model) for model in (few.transformed, few.original)]
    found, expected = (
        generate(model, past_key_values=cache, disable_compile=True).sequences
        for model, cache in zip((few.transformed, few.original), caches, strict=True)
    )
    assert torch.equal(found, expected)
    assert all(type(layer).__name__.startswith("Packed") for layer in caches[0].layers)


def test_a_conversation_continues_on_its_cache(few):
    ids, mask = zoo.prompt()
    more = zoo.prompt(length=5, padding=(0, 0, 0), seed=2)[0]
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    results = []
    for model in (few.transformed, few.original):
        first = model.generate(ids, attention_mask=mask, max_new_tokens=4, **options)
        longer = torch.cat([first.sequences, more], 1)
        seen = torch.cat([mask, mask.new_ones(3, longer.shape[1] - mask.shape[1])], 1)
        second = model.generate(
            longer,
            attention_mask=seen,
            past_key_values=first.past_key_values,
            max_new_tokens=NEW,
            **options,
        )
        results.append(second.sequences)
    assert torch.equal(*results)
