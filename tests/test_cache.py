"""The packed cache: whole-cache operations, chunks, padding, positions, and every byte it holds."""

import copy
import dataclasses

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given, settings
from transformers import DynamicCache, StaticCache
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx import collect
from rotatekv_fx.calibration import model_fingerprint
from rotatekv_fx.errors import StateError

LENGTH = 24
PADDING = (0, 4, 9)
SPACE = 40  # of static caches
CLOSE = 2e-5
# A rounding difference may tip a code over to its neighbour: far below the error that 2-bit codes make.
CLOSE_IN_CODES = 0.02


class Sequences:
    """The simple model of a cache: the tokens themselves. Operations on a cache are list operations on it."""

    def __init__(self, ids, mask):
        self.ids, self.mask = ids, mask

    @classmethod
    def prompt(cls, seed=0, length=LENGTH, padding=PADDING):
        return cls(*zoo.prompt(length=length, padding=padding, seed=seed))

    @property
    def positions(self):
        return zoo.positions_of(self.mask)

    def grown(self, ids):
        return Sequences(torch.cat([self.ids, ids], 1), torch.cat([self.mask, torch.ones_like(ids)], 1))

    def cut(self, length):
        return Sequences(self.ids[:, :length], self.mask[:, :length])

    def rows(self, index):
        return Sequences(self.ids[index], self.mask[index])

    def with_mask(self, mask):
        return Sequences(self.ids, mask)


@torch.no_grad()
def run(model, sequences, cache=None, start=0, stop=None, **options):
    """Logits of tokens start to stop of the sequences, on a cache that holds those before."""
    part = sequences.cut(stop) if stop is not None else sequences
    return model(
        part.ids[:, start:],
        attention_mask=part.mask,
        position_ids=part.positions[:, start:],
        past_key_values=cache,
        use_cache=cache is not None,
        **options,
    ).logits


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model, length=SPACE):
    return StaticCache(config=model.config, max_cache_len=length)


def filled(model, make=dynamic, sequences=None):
    cache = make(model)
    run(model, sequences or Sequences.prompt(), cache)
    return cache


def next_tokens(batch, count=1, seed=11):
    return torch.randint(3, zoo.VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def real(sequences, logits):
    """Logits of tokens that are no padding."""
    return logits[sequences.mask[:, -logits.shape[1] :].bool()]


def storages(found):
    """Bytes of every storage that can be reached from an object, by address."""
    seen, pending, sizes = set(), [found], {}
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.numel():
                sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += item
        elif dataclasses.is_dataclass(item) or hasattr(item, "__dict__"):
            pending += vars(item).values()
    return sizes


# Recipe `none` stores exact tensors, so every operation has an exact answer.


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral"])
def exact(request):
    """(untransformed model, its transformed copy): full layers, both kinds, sliding layers only."""
    return zoo.shared(request.param), zoo.packed(request.param, "none")


BATCH_OPERATIONS = {
    "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), lambda s: s.rows([2, 0, 1])),
    "reorder with repeats": (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), lambda s: s.rows([1, 1, 0])),
    "repeat": (lambda c: c.batch_repeat_interleave(2), lambda s: s.rows([0, 0, 1, 1, 2, 2])),
    "select": (lambda c: c.batch_select_indices(torch.tensor([2, 1])), lambda s: s.rows([2, 1])),
    "repeat, then select": (
        lambda c: (c.batch_repeat_interleave(3), c.batch_select_indices(torch.tensor([1, 4, 8]))),
        lambda s: s,
    ),
}


@pytest.mark.parametrize("name", BATCH_OPERATIONS)
def test_batch_operations(exact, name):
    model, packed = exact
    operate, expected = BATCH_OPERATIONS[name]
    cache = filled(packed)
    operate(cache)
    after = expected(Sequences.prompt())
    longer = after.grown(next_tokens(len(after.ids), 3))
    for start in range(LENGTH, LENGTH + 3):
        found = run(packed, longer, cache, start, start + 1)
        wanted = run(model, longer, stop=start + 1)[:, -1:]
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("removed", [1, 3, 17, LENGTH])
def test_crop(exact, removed):
    model, packed = exact
    cache = dynamic(packed)
    cache.activate_past_recording()
    run(packed, Sequences.prompt(), cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == LENGTH - removed
    after = Sequences.prompt(padding=()).cut(LENGTH - removed) if removed == LENGTH else Sequences.prompt()
    after = after.cut(LENGTH - removed).grown(next_tokens(3, 2))
    found = run(packed, after, cache, LENGTH - removed)
    torch.testing.assert_close(found, run(model, after)[:, -2:], rtol=0, atol=CLOSE)


def test_a_positive_crop_is_the_length_to_keep():
    model, packed = zoo.shared("llama"), zoo.packed("llama", "none")
    cache, after = filled(packed), Sequences.prompt().cut(15).grown(next_tokens(3))
    cache.crop(LENGTH + 5)
    assert cache.get_seq_length() == LENGTH
    cache.crop(15)
    assert cache.get_seq_length() == 15
    torch.testing.assert_close(run(packed, after, cache, 15), run(model, after)[:, -1:], rtol=0, atol=CLOSE)


def test_cropping_by_nothing_changes_nothing(exact):
    model, packed = exact
    cache = dynamic(packed)
    cache.activate_past_recording()
    run(packed, Sequences.prompt(), cache)
    cache.crop(0)
    longer = Sequences.prompt().grown(next_tokens(3))
    found = run(packed, longer, cache, LENGTH)
    torch.testing.assert_close(found, run(model, longer)[:, -1:], rtol=0, atol=CLOSE)


def test_a_full_sliding_layer_that_records_nothing_cannot_be_cropped():
    cache = filled(zoo.packed("mistral", "none"))
    with pytest.raises(StateError, match="activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize("make", [dynamic, static])
def test_reset_forgets_everything(exact, make):
    model, packed = exact
    cache = filled(packed, make, Sequences.prompt(seed=3))
    run(packed, Sequences.prompt(seed=3).grown(next_tokens(3)), cache, LENGTH)
    cache.reset()
    assert all(int(layer.get_seq_length()) == 0 for layer in cache.layers)
    prompt = Sequences.prompt()
    longer = prompt.grown(next_tokens(3))
    found = torch.cat([run(packed, prompt, cache), run(packed, longer, cache, LENGTH)], 1)
    torch.testing.assert_close(real(longer, found), real(longer, run(model, longer)), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("length", [SPACE, LENGTH + 3])
def test_static_layers_reorder_in_place(exact, length):
    model, packed = exact
    cache = filled(packed, lambda m: static(m, length))
    before = storages(cache).keys()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    longer = Sequences.prompt().rows([2, 0, 1]).grown(next_tokens(3, 3))
    for start in range(LENGTH, LENGTH + 3):
        found = run(packed, longer, cache, start, start + 1)
        wanted = run(model, longer, stop=start + 1)[:, -1:]
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
    assert storages(cache).keys() == before


@st.composite
def operations(draw):
    """A few operations in a row: (name, seed of what it needs)."""
    kinds = st.sampled_from(["step", "chunk", "crop", "reorder", "repeat", "select"])
    return [(kind, draw(st.integers(0, 10**6))) for kind in draw(st.lists(kinds, min_size=2, max_size=5))]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(plan=operations())
def test_operations_in_any_order(plan):
    model, packed = zoo.shared("gemma2"), zoo.packed("gemma2", "none")
    state = Sequences.prompt(length=12)
    cache = dynamic(packed)
    cache.activate_past_recording()
    run(packed, state, cache)
    recorded = 12  # tokens since the last crop: a sliding layer keeps no more
    for kind, seed in plan:
        batch, length = state.ids.shape
        generator = torch.Generator().manual_seed(seed)
        if kind in ("step", "chunk"):
            longer = state.grown(next_tokens(batch, 1 if kind == "step" else 5, seed))
            found, wanted = run(packed, longer, cache, length), run(model, longer)[:, length:]
            torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
            state, recorded = longer, recorded + longer.ids.shape[1] - length
        elif kind == "crop":
            removed = min(seed % 4, recorded)
            cache.crop(-removed)
            state, recorded = state.cut(length - removed), 0
        elif kind == "reorder":
            index = torch.randint(0, batch, (batch,), generator=generator)
            cache.reorder_cache(index)
            state = state.rows(index)
        elif kind == "repeat" and batch < 12:
            cache.batch_repeat_interleave(2)
            state = state.rows(torch.arange(batch).repeat_interleave(2))
        elif kind == "select":
            index = torch.randperm(batch, generator=generator)[: max(1, batch - 1)]
            cache.batch_select_indices(index)
            state = state.rows(index)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [state.ids.shape[1]] * 2
    longer = state.grown(next_tokens(len(state.ids)))
    found = run(packed, longer, cache, state.ids.shape[1])
    torch.testing.assert_close(found, run(model, longer)[:, -1:], rtol=0, atol=CLOSE)


# Recipe `paper`: what a packed cache reads must not depend on the way the tokens came into it.


KINDS = {
    "llama": ("llama", {"sinks": 0}),
    "llama, sinks": ("llama", {"sinks": 6}),
    "llama, window": ("llama", {"sinks": 0, "window": 5, "slack": 6}),
    "gemma3_text": ("gemma3_text", {"sinks": 0}),
    "gemma3_text, sinks": ("gemma3_text", {"sinks": 6}),
    "gemma3_text, window": ("gemma3_text", {"sinks": 0, "window": 5, "slack": 6}),
    "gpt_neox, sinks": ("gpt_neox", {"sinks": 6, "layers": 1}),
    "gptj, sinks": ("gptj", {"sinks": 6, "layers": 1}),
}


class Paper:
    """A model with 2-bit codes, its logits for the prompt, and how far the codes move them."""

    def __init__(self, name, settings):
        self.name, self.sinks, self.window = name, settings["sinks"], settings.get("window", 0)
        self.model = zoo.packed(name, **settings)
        prompt = Sequences.prompt()
        self.logits = run(self.model, prompt, dynamic(self.model))
        exact = run(zoo.shared(name, settings.get("layers", 2)), prompt)
        self.error = zoo.relative(real(prompt, self.logits), real(prompt, exact))


@pytest.fixture(scope="module", params=KINDS)
def paper(request):
    return Paper(*KINDS[request.param])


def test_two_bits_show_in_the_logits(paper):
    """Otherwise the comparisons below could not fail."""
    assert paper.error > 5 * CLOSE_IN_CODES


def test_forward_without_cache_is_that_with_a_cache(paper):
    prompt = Sequences.prompt()
    assert zoo.relative(real(prompt, run(paper.model, prompt)), real(prompt, paper.logits)) < 1e-6


@pytest.mark.parametrize("length", [LENGTH, SPACE])
def test_static_cache_gives_the_logits_of_a_dynamic_one(paper, length):
    prompt = Sequences.prompt()
    found = run(paper.model, prompt, static(paper.model, length))
    assert zoo.relative(real(prompt, found), real(prompt, paper.logits)) < CLOSE_IN_CODES


def test_static_decode_gives_the_logits_of_a_dynamic_one(paper):
    longer = Sequences.prompt().grown(next_tokens(3, 10))
    caches = filled(paper.model, dynamic), filled(paper.model, static)
    for start in range(LENGTH, LENGTH + 10):
        one, other = (run(paper.model, longer, cache, start, start + 1) for cache in caches)
        assert zoo.relative(other, one) < CLOSE_IN_CODES


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("cuts", [(10,), (3, 12, 13, 14)])
def test_chunks_give_the_logits_of_one_prefill(paper, make, cuts):
    prompt, cache = Sequences.prompt(), make(paper.model)
    parts = [
        run(paper.model, prompt, cache, start, stop)
        for start, stop in zip((0, *cuts), (*cuts, LENGTH), strict=True)
    ]
    found = zoo.relative(real(prompt, torch.cat(parts, 1)), real(prompt, paper.logits))
    if paper.sinks:  # an early chunk cannot know the sinks of a later one
        assert found < paper.error
    else:
        assert found < (1e-6 if make is dynamic and not paper.window else CLOSE_IN_CODES)


def test_padding_changes_nothing(paper):
    prompt, padded = Sequences.prompt(), filled(paper.model)
    for row, pad in enumerate(PADDING):
        cache = dynamic(paper.model)
        with torch.no_grad():
            found = paper.model(prompt.ids[row : row + 1, pad:], past_key_values=cache).logits[0]
        assert zoo.relative(found, paper.logits[row, pad:]) < CLOSE_IN_CODES
        if paper.sinks:
            for one, both in zip(cache.layers, padded.layers, strict=True):
                tokens = both.sinks.tokens[row]
                assert torch.equal(torch.where(tokens < 0, -1, tokens - pad), one.sinks.tokens[0])


def test_sequences_of_a_batch_do_not_meet(paper):
    prompt = Sequences.prompt()
    for row, pad in enumerate(PADDING):
        alone = run(paper.model, prompt.rows([row]), dynamic(paper.model))
        assert zoo.relative(alone[0, pad:], paper.logits[row, pad:]) < CLOSE_IN_CODES


@pytest.mark.parametrize("name", BATCH_OPERATIONS)
def test_batch_operations_equal_a_cache_built_for_the_result(paper, name):
    operate, expected = BATCH_OPERATIONS[name]
    cache = filled(paper.model)
    operate(cache)
    after = expected(Sequences.prompt())
    direct = filled(paper.model, sequences=after)
    longer = after.grown(next_tokens(len(after.ids), 2))
    for start in (LENGTH, LENGTH + 1):
        found, wanted = (run(paper.model, longer, c, start, start + 1) for c in (cache, direct))
        assert zoo.relative(found, wanted) < CLOSE_IN_CODES
    assert rk.cache_nbytes(cache) == rk.cache_nbytes(direct)


def test_crop_equals_a_cache_built_for_the_result(paper):
    cache, left = dynamic(paper.model), LENGTH - 5
    cache.activate_past_recording()
    run(paper.model, Sequences.prompt(), cache)
    cache.crop(-5)
    after = Sequences.prompt().cut(left)
    longer = after.grown(next_tokens(3, 2))
    direct = filled(paper.model, sequences=after)
    found, wanted = (run(paper.model, longer, c, left) for c in (cache, direct))
    # the shorter prompt may name other sinks
    assert zoo.relative(found, wanted) < (paper.error if paper.sinks else CLOSE_IN_CODES)


def test_reset_static_cache_equals_a_new_one(paper):
    cache = filled(paper.model, static, Sequences.prompt(seed=4))
    run(paper.model, Sequences.prompt(seed=4).grown(next_tokens(3)), cache, LENGTH)
    cache.reset()
    prompt = Sequences.prompt()
    fresh = run(paper.model, prompt, static(paper.model))
    assert zoo.relative(real(prompt, run(paper.model, prompt, cache)), real(prompt, fresh)) < 1e-6


@pytest.mark.parametrize("make", [dynamic, static])
def test_deep_copy_of_a_cache_is_independent(paper, make):
    cache = filled(paper.model, make)
    copied = copy.deepcopy(cache)
    assert not storages(cache).keys() & storages(copied).keys()
    longer = Sequences.prompt().grown(next_tokens(3, 2))
    first = run(paper.model, longer, cache, LENGTH, LENGTH + 1)
    run(paper.model, longer, cache, LENGTH + 1)
    assert int(copied.get_seq_length()) == LENGTH
    assert torch.equal(run(paper.model, longer, copied, LENGTH, LENGTH + 1), first)


# Sinks


def massive(block_input, mask, count):
    """Per sequence, the tokens that own the `count` largest |values| of a block's input, padding left out."""
    chosen = []
    for hidden, visible in zip(block_input, mask, strict=True):
        order = (hidden.abs() * visible[:, None]).flatten().sort(descending=True).indices[:count]
        chosen.append(set((order // hidden.shape[1]).tolist()))
    return chosen


def named(layer):
    return [{token for token in row if token >= 0} for row in layer.sinks.tokens.tolist()]


@pytest.fixture(scope="module")
def with_outliers():
    """A transformed llama in whose residual stream token 7 is massive."""
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 5] = 30.0
        model.model.embed_tokens.weight[0, 5] = 90.0  # the padding token even more so
    # keys and values of the calibration are those of a model without outliers: any order of channels will do
    layers = zoo.shared_calibration("llama").layers
    calibration = rk.Calibration(layers, model_fingerprint(model), "another model")
    return zoo.transformed(model, calibration=calibration, sinks=4)


def prompt_with_outliers():
    prompt = Sequences.prompt()
    prompt.ids[:, 20] = prompt.ids[1, 6] = 7
    return prompt


@pytest.mark.parametrize("make", [dynamic, static])
def test_sinks_are_the_massive_activations_of_each_layer(with_outliers, make):
    packed, prompt = with_outliers, prompt_with_outliers()
    cache = make(packed)
    with torch.no_grad():
        outputs = packed(
            prompt.ids,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            past_key_values=cache,
            output_hidden_states=True,
        )
    for index, layer in enumerate(cache.layers):
        found = named(layer)
        assert found == massive(outputs.hidden_states[index], prompt.mask, 4)
        assert all(20 in row for row in found)
        assert 6 in found[1]
        assert all(min(row) >= pad for row, pad in zip(found, PADDING, strict=True))


def test_decoding_adds_no_sinks(with_outliers):
    packed = with_outliers
    cache = filled(packed, sequences=prompt_with_outliers())
    before = [named(layer) for layer in cache.layers]
    longer = prompt_with_outliers().grown(torch.full((3, 6), 7))
    run(packed, longer, cache, LENGTH, LENGTH + 1)
    run(packed, longer, cache, LENGTH + 1)  # a verification step of assisted decoding
    assert [named(layer) for layer in cache.layers] == before


def test_chunked_prefill_keeps_a_running_choice(with_outliers):
    packed = with_outliers
    whole, cache, prompt = dynamic(packed), dynamic(packed), prompt_with_outliers()
    run(packed, prompt, whole)
    for start in range(0, LENGTH, 6):
        run(packed, prompt, cache, start, start + 6)
    one, other = (c.layers[0].sinks for c in (cache, whole))
    assert named(cache.layers[0]) == named(whole.layers[0])
    torch.testing.assert_close(one.scores, other.scores)
    for row in range(3):
        keys = [
            {int(t): k for t, k in zip(s.tokens[row], s.keys[row].unbind(1), strict=True)}
            for s in (one, other)
        ]
        for token, key in keys[0].items():
            assert zoo.relative(key.float(), keys[1][token].float()) < 1e-3


def test_crop_forgets_the_sinks_it_removes(with_outliers):
    packed = with_outliers
    cache = filled(packed, sequences=prompt_with_outliers())
    cache.crop(-6)
    assert all(token < LENGTH - 6 for layer in cache.layers for row in named(layer) for token in row)


def test_sinks_are_read_exactly():
    """With a sink for each value of the residual stream, two bits are as good as sixteen."""
    prompt = Sequences.prompt()
    expected = real(prompt, run(zoo.shared("llama", 1), prompt))
    errors = []
    for sinks in (0, 128 * LENGTH):
        packed = zoo.packed("llama", layers=1, sinks=sinks)
        errors.append(zoo.relative(real(prompt, run(packed, prompt, dynamic(packed))), expected))
    assert errors[1] < 0.01 < 0.2 < errors[0]


# Positions

EIGHT_BITS = {"key_bits": 8, "value_bits": 8, "sinks": 0}


@pytest.mark.parametrize(
    ("name", "bits", "stored", "stores"),
    [
        ("llama", 2, "ids", 1),
        ("gemma3_text", 2, "ids", 2),  # its sliding layer keeps fewer
        ("llama_dynamic", 8, "rows", 1),
        ("phi3_longrope", 8, "rows", 1),
    ],
)
def test_positions_are_stored_once_for_all_layers(name, bits, stored, stores):
    packed = zoo.packed(name, sinks=0) if bits == 2 else zoo.packed(name, **EIGHT_BITS)
    assert {site.positions for site in rk.report(packed).sites} == {stored}
    cache = filled(packed)
    found = [layer.positions.tensors() for layer in cache.layers if layer.positions is not None]
    assert len(found) == stores
    wanted = torch.int32 if stored == "ids" else torch.float32
    assert all(tensor.dtype is wanted for tensors in found for tensor in tensors)


def test_a_layer_without_rope_stores_no_positions():
    packed = zoo.packed("smollm3", sinks=0)
    assert [site.positions for site in rk.report(packed).sites] == ["ids", "none"]
    assert [bool(site.rope) for site in rk.report(packed).sites] == [True, False]
    cache = filled(packed)
    assert [layer.positions is not None for layer in cache.layers] == [True, False]


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_keys_keep_the_rows_they_were_stored_with(name):
    """The rope of these models changes with the length; keys that are cached keep theirs."""
    model, packed = zoo.shared(name), zoo.packed(name, **EIGHT_BITS)
    longer = Sequences.prompt(length=12, padding=(0, 0, 0)).grown(next_tokens(3, 12))
    caches = dynamic(model), dynamic(packed)
    for start, stop in ((0, 12), (12, 18), *((i, i + 1) for i in range(18, 24))):
        expected, found = (
            run(m, longer, c, start, stop) for m, c in zip((model, packed), caches, strict=True)
        )
        assert zoo.relative(found, expected) < 0.05
    at_once = run(packed, longer)[:, -1]
    assert zoo.relative(at_once, found[:, -1]) > 0.05  # the rows did change on the way


def test_positions_need_not_follow_the_index():
    """Position ids with a gap, such as a caller may give."""
    model, packed = zoo.shared("llama", 1), zoo.packed("llama", layers=1, **EIGHT_BITS)
    ids = zoo.prompt(padding=())[0]
    gapped = torch.arange(14)[None] + 40 * (torch.arange(14) >= 6)
    with torch.no_grad():
        expected, plain = model(ids, position_ids=gapped).logits, model(ids).logits
        found = packed(ids, position_ids=gapped, past_key_values=dynamic(packed)).logits
    assert zoo.relative(plain, expected) > 0.1
    assert zoo.relative(found, expected) < 0.03


# Bytes


@pytest.mark.parametrize("make", [dynamic, static])
def test_nbytes_is_every_storage_once(paper, make):
    cache = filled(paper.model, make)
    longer = Sequences.prompt().grown(next_tokens(3, 2))
    for start in (LENGTH, LENGTH + 1):
        run(paper.model, longer, cache, start, start + 1)
    constants = storages([layer.spec for layer in cache.layers])  # of the model, and every cache's
    reachable = sum(nbytes for at, nbytes in storages(cache.layers).items() if at not in constants)
    bookkeeping = 8 * 4 * len(cache.layers)  # lengths and windows that are tensors
    assert 0 <= reachable - rk.cache_nbytes(cache) <= bookkeeping


def test_nbytes_of_an_untransformed_cache():
    assert rk.cache_nbytes(filled(zoo.shared("llama"))) == 2 * 2 * (3 * 2 * LENGTH * 32) * 4


def test_nbytes_by_hand():
    """Two layers, keys and values, 2 x 32 channels at 2 bits: 16 bytes of codes, a scale and a zero point."""
    packed = zoo.packed("llama", sinks=0)
    a_token, a_position = 2 * 2 * (16 + 2 + 2), 4
    assert rk.cache_nbytes(filled(packed)) == 3 * LENGTH * (a_token + a_position)
    with torch.no_grad():  # the same positions for the whole batch
        cache = packed(zoo.prompt(padding=())[0]).past_key_values
    assert rk.cache_nbytes(cache) == 14 * (3 * a_token + a_position)


def test_sizes_of_a_growing_history_share_compiled_kernels(paper):
    """They are multiples of 16, or Triton would compile again when one is and the last was not."""
    cache = filled(paper.model)
    longer = Sequences.prompt().grown(next_tokens(3, 2))
    sizes = set()
    for start in (LENGTH, LENGTH + 1):
        run(paper.model, longer, cache, start, start + 1)
        full = [layer for layer in cache.layers if not layer.is_sliding]
        sizes |= {layer.history.tensors()[0].shape[2] % 16 for layer in full}
    assert sizes <= {0}


def test_nothing_wide_is_held(paper):
    """Codes are bytes; only scales, positions and exact tokens are not."""
    ids, mask = zoo.prompt(length=LENGTH)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    cache = paper.model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **options
    ).past_key_values
    tokens, exact = LENGTH + 11, 0
    rows = rk.report(paper.model).sites[0].positions == "rows"
    for layer in cache.layers:
        for tensor in layer.stored_tensors():
            assert tensor.dtype in (torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32)
            if tensor.dtype is torch.float32 and rows and tensor.dim() == 4:
                continue  # of the rotary embedding
            wide = tensor.dtype.is_floating_point and tensor.dim() == 4
            exact = max(exact, tensor.shape[2] if wide else 0)
            assert tensor.dtype is not torch.float32 or tensor.shape[1:] == (paper.sinks,)  # their scores
        assert layer.keys.numel() == layer.values.numel() == 0
    assert exact == max(paper.sinks, min(paper.window + 6, tokens) if paper.window else 0)


@pytest.mark.slow
def test_two_bits_at_the_geometry_of_the_reference_model(monkeypatch):
    """1,024 tokens, batch 8: at most 2.30 bits an element, and the figure is the sum of the storages."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = zoo.build("llama", layers=6, **sizes, head_dim=64, max_position_embeddings=1024)
    monkeypatch.setattr(collect, "GENERATED_WINDOWS", 1)
    monkeypatch.setattr(collect, "GENERATED_LENGTH", 128)
    packed = rk.transform(model, rk.RotateKVConfig(recipe="paper", sinks=0))
    ids, mask = zoo.prompt(8, 1024, (0, 5))
    elements = 8 * 1024 * 6 * (2 * 4 * 64)
    for make in (dynamic, lambda m: static(m, 1024)):
        cache = filled(packed, make, Sequences(ids, mask))
        held = sum(storages([layer.stored_tensors() for layer in cache.layers]).values())
        assert 2.25 < held * 8 / elements <= 2.30
        assert 0 <= rk.cache_nbytes(cache) - held <= 8 * 4 * 6


# Refusals


@pytest.mark.parametrize("make", [dynamic, static])
def test_a_cache_filled_by_an_untransformed_model_is_refused(exact, make):
    model, packed = exact
    with pytest.raises(StateError, match="16-bit keys"):
        run(packed, Sequences.prompt().grown(next_tokens(3)), filled(model, make), LENGTH)


@pytest.mark.parametrize("make", [dynamic, static])
def test_a_packed_cache_is_refused_by_an_untransformed_model(exact, make):
    model, packed = exact
    with pytest.raises(StateError, match="not transformed"):
        run(model, Sequences.prompt().grown(next_tokens(3)), filled(packed, make), LENGTH)


@pytest.mark.parametrize("make", [dynamic, static])
def test_update_of_a_packed_layer_raises(exact, make):
    _, packed = exact
    token = torch.zeros(3, 2, 1, 32)
    for layer in filled(packed, make).layers:
        with pytest.raises(StateError, match="packed cache layer"):
            layer.update(token, token)


def test_a_prompt_longer_than_the_static_cache():
    packed = zoo.packed("llama", "none")
    with pytest.raises(StateError, match=f"{LENGTH} new tokens do not fit a static cache of 20"):
        run(packed, Sequences.prompt(), static(packed, 20))


def test_a_static_cache_that_is_full_takes_no_more():
    packed = zoo.packed("llama", "none")
    cache = filled(packed, lambda m: static(m, LENGTH))
    with pytest.raises(StateError, match=f"static cache of {LENGTH} that holds {LENGTH}"):
        run(packed, Sequences.prompt().grown(next_tokens(3)), cache, LENGTH)


@pytest.mark.parametrize(
    "operate",
    [lambda c: c.batch_repeat_interleave(2), lambda c: c.batch_select_indices(torch.tensor([1]))],
    ids=["repeat", "select"],
)
def test_a_static_cache_keeps_its_batch(exact, operate):
    _, packed = exact
    cache = filled(packed, static)
    expected = copy.deepcopy(cache)
    with pytest.raises(StateError, match="batch size"):
        operate(cache)
    longer = Sequences.prompt().grown(next_tokens(3))
    found, wanted = (run(packed, longer, c, LENGTH) for c in (cache, expected))
    assert torch.equal(found, wanted)


def has_streams():
    """A build of torch for CUDA makes none without a driver, and transformers' offloading needs one."""
    try:
        torch.Stream()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not has_streams(), reason="needs a stream to offload with")
def test_an_offloading_cache_is_refused(exact):
    _, packed = exact
    cache = DynamicCache(config=packed.config, offloading=True)
    with pytest.raises(StateError, match="offload"):
        run(packed, Sequences.prompt(), cache)


def test_offloading_is_refused(exact):
    _, packed = exact
    for layer in filled(packed).layers:
        with pytest.raises(StateError, match="offload"):
            layer.offload()


def test_other_kinds_of_cache_are_refused(exact):
    _, packed = exact

    class MyCache(DynamicCache):
        pass

    with pytest.raises(StateError, match="MyCache"):
        run(packed, Sequences.prompt(), MyCache(config=packed.config))
