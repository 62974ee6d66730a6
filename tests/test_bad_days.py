"""Bad days: whatever goes wrong, the model stays usable, or one error says what to do."""

import copy
import threading

import pytest
import torch
import zoo
from safetensors.torch import safe_open, save_file
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx import api, binding
from rotatekv_fx.cache.runtime import AttentionRuntime
from rotatekv_fx.errors import CalibrationError, StateError

RECIPES = {
    "none": {},
    "paper": {"sinks": 6},
    "centered": {"window": 4, "slack": 2, "sinks": 6},
}
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FAILURES = [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]


@pytest.fixture(scope="module", params=RECIPES)
def packed(request):
    return zoo.packed("llama", request.param, **RECIPES[request.param])


@torch.no_grad()
def logits(model, ids=None, **options):
    return model(zoo.prompt()[0] if ids is None else ids, **options).logits


def generate(model, ids=None, **options):
    ids = zoo.prompt(padding=())[0] if ids is None else ids
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})


class FailsAt:
    """A function that raises at its n-th call."""

    def __init__(self, function, error, number):
        self.function, self.error, self.left = function, error, number

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


# Out of memory and Ctrl-C


@pytest.mark.parametrize("error", FAILURES, ids=["memory", "interrupt"])
@pytest.mark.parametrize(
    ("where", "name", "number"),
    [
        (api, "capture", 1),
        (api, "run_passes", 2),
        (api, "bind", 2),
        (binding, "_set_parameter", 5),
        (api, "_bind_all", 1),
        (nn.Module, "add_module", 3),
    ],
)
def test_a_transform_that_breaks_off_leaves_the_model_as_it_was(monkeypatch, error, where, name, number):
    model = zoo.build("llama")
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    failing = FailsAt(getattr(where, name), error, number)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: failing(*args, **kwargs))
    config = rk.RotateKVConfig(recipe="paper", sinks=6)
    with pytest.raises(type(error)):
        rk.transform(model, config, zoo.shared_calibration("llama"))
    monkeypatch.undo()
    assert failing.left <= 0
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    rk.transform(model, config, zoo.shared_calibration("llama"))
    assert torch.equal(logits(model), logits(zoo.packed("llama", sinks=6)))


@pytest.mark.parametrize("error", FAILURES, ids=["memory", "interrupt"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("call", [1, 2, 8])  # the first layer, the second one, and while tokens are written
def test_generating_that_breaks_off_leaves_the_model_usable(monkeypatch, packed, error, cache, call):
    options = {} if cache is None else {"cache_implementation": "static", "disable_compile": True}
    expected = generate(packed, **options)
    failing = FailsAt(AttentionRuntime._received, error, call)
    with monkeypatch.context() as patch:
        patch.setattr(AttentionRuntime, "_received", lambda *args: failing(*args))
        with pytest.raises(type(error)):
            generate(packed, **options)
    assert failing.left == 0
    assert torch.equal(generate(packed, **options), expected)


def test_a_static_cache_can_be_used_again_after_a_break(monkeypatch, packed):
    cache = StaticCache(config=packed.config, max_cache_len=40)
    expected = generate(packed)
    failing = FailsAt(AttentionRuntime._received, KeyboardInterrupt(), 6)
    with monkeypatch.context() as patch:
        patch.setattr(AttentionRuntime, "_received", lambda *args: failing(*args))
        with pytest.raises(KeyboardInterrupt):
            generate(packed, past_key_values=cache, disable_compile=True)
    cache.reset()
    assert torch.equal(generate(packed, past_key_values=cache, disable_compile=True), expected)


# NaN and infinity


class Poisoned:
    """While it lasts, one token of one sequence has bad keys and values in the first layer."""

    def __init__(self, model, token, value, sequence=0):
        self.layer, self.place, self.value = model.model.layers[0].input_layernorm, (sequence, token), value

    def __enter__(self):
        def spoil(module, args, output):
            output = output.clone()
            if self.place[1] < output.shape[1]:
                output[self.place][:3] = self.value
            return output

        self.hook = self.layer.register_forward_hook(spoil)

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_debug_mode_names_the_first_bad_key(recipe, value):
    calibration = None if recipe == "none" else zoo.shared_calibration("llama")
    model = zoo.transformed(zoo.shared("llama"), recipe, calibration, debug=True, **RECIPES[recipe])
    assert torch.equal(logits(model), logits(zoo.packed("llama", recipe, **RECIPES[recipe])))
    message = r"layer 0: the key of new token 7 of sequence 1 is not finite \(1 of 42 tokens\)"
    with Poisoned(model, 7, value, sequence=1), pytest.raises(StateError, match=message):
        logits(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_key_stays_with_its_token(packed, value):
    """Cropped away, it leaves no trace in other tokens' codes; other sequences never see it."""
    ids = zoo.prompt(padding=())[0]
    last = ids.shape[1] - 1
    clean, spoiled = (DynamicCache(config=packed.config) for _ in range(2))
    for cache in (clean, spoiled):
        logits(packed, ids[:, :last], past_key_values=cache)
    whole = logits(packed, ids[:, last:], past_key_values=copy.deepcopy(clean))
    with Poisoned(packed, 0, value):
        found = logits(packed, ids[:, last:], past_key_values=spoiled)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1:], whole[1:])
    spoiled.crop(-1)
    for length in (1, 3):
        more = zoo.prompt(padding=(), length=length, seed=length)[0]
        found, expected = (logits(packed, more, past_key_values=cache) for cache in (spoiled, clean))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_is_no_sink(value):
    residual = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    residual[0, 4, 3] = value
    scores, tokens = torch.ops.rotatekv.select_sinks(residual, None, 5)
    assert scores.isfinite().all()
    assert 4 not in tokens[0].tolist()
    clean = torch.ops.rotatekv.select_sinks(residual[1:], None, 5)
    assert torch.equal(scores[1:], clean[0])
    assert torch.equal(tokens[1:], clean[1])


# Unusual inputs


@pytest.mark.parametrize("recipe", ["paper", "centered"])
def test_keys_that_are_all_equal(recipe):
    """Scales are 0 then, and covariances too."""
    model = zoo.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
    bits = {"key_bits": 2, "value_bits": 8}
    model_logits = logits(model)
    packed = zoo.transformed(model, recipe, zoo.calibrated(model), **bits, **RECIPES[recipe])
    assert zoo.relative(logits(packed), model_logits) < 0.02


def test_a_prompt_of_one_token(packed):
    ids = zoo.prompt(padding=())[0][:, :1]
    found = generate(packed, ids, return_dict_in_generate=True)
    assert found.sequences.shape == (3, 9)
    static = generate(packed, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, found.sequences)
    assert rk.cache_nbytes(found.past_key_values) > 0
    if rk.report(packed).config["recipe"] == "none":
        assert torch.equal(found.sequences, generate(zoo.shared("llama"), ids))


def test_a_prompt_longer_than_the_static_cache(packed):
    cache = StaticCache(config=packed.config, max_cache_len=10)
    with pytest.raises(StateError, match="14 new tokens do not fit a static cache of 10.*max_cache_len"):
        logits(packed, zoo.prompt()[0], past_key_values=cache)
    assert generate(packed).shape == (3, 22)


def test_more_tokens_than_the_static_cache_holds(packed):
    cache = StaticCache(config=packed.config, max_cache_len=16)
    with pytest.raises(StateError, match="1 new tokens do not fit a static cache of 16 that holds 16"):
        generate(packed, past_key_values=cache, disable_compile=True)


def test_a_batch_of_different_lengths_is_each_sequence_by_itself(packed):
    ids, mask = zoo.prompt()
    with torch.no_grad():
        together = packed(ids, attention_mask=mask, position_ids=zoo.positions_of(mask)).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = packed(ids[row : row + 1, -length:]).logits[0]
            assert zoo.relative(together[row, -length:], alone) < 0.02


@pytest.mark.parametrize("recipe", ["paper", "centered"])
def test_a_calibration_text_of_the_vocabulary(recipe):
    """Each token once, in order: poor statistics, but a model that works."""
    model = zoo.shared("llama")
    calibration = rk.calibrate(model, torch.arange(zoo.VOCABULARY).split(64), progress=zoo.quiet)
    settings = {**RECIPES[recipe], "key_bits": 8, "value_bits": 8}
    assert zoo.relative(logits(zoo.transformed(model, recipe, calibration, **settings)), logits(model)) < 0.02


def test_a_calibration_text_of_few_tokens():
    """Keys and values then leave directions unseen, and rotations fitted to them would ruin the model."""
    text = torch.arange(16).repeat(12).split(64)
    with pytest.raises(CalibrationError, match="16 different tokens, fewer than the 32 channels of a head"):
        rk.calibrate(zoo.shared("llama"), text, progress=zoo.quiet)


# Calibration files


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "calibration.safetensors"
    zoo.shared_calibration("llama").save(path)
    return path


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_a_truncated_calibration_file(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CalibrationError, match="damaged"):
        rk.Calibration.load(file)


@pytest.mark.parametrize("what", ["tensor", "source", "fingerprint"])
def test_a_tampered_calibration_file(file, what):
    with safe_open(file, framework="pt") as opened:
        header, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if what == "tensor":
        tensors["1.key_mean"][0, 0] += 1e-9
    else:
        header["rotatekv"] = header["rotatekv"].replace(f'"{what}": "', f'"{what}": "0')
    save_file(tensors, file, header)
    with pytest.raises(CalibrationError, match="was changed after it was written"):
        rk.Calibration.load(file)


def test_a_flipped_bit_in_a_calibration_file(file):
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match="was changed after it was written"):
        rk.Calibration.load(file)


# Threads


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_threads_that_generate_at_once(packed, options):
    """Each with a prompt of its own length, on one model."""
    prompts = [zoo.prompt(padding=(), length=5 + 3 * i, seed=i)[0] for i in range(4)]
    expected = [generate(packed, ids, **options) for ids in prompts]
    found = [[] for _ in prompts]
    start = threading.Barrier(len(prompts))

    def work(number):
        start.wait()
        found[number] += [generate(packed, prompts[number], **options) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(found, expected, strict=True):
        assert len(results) == 2
        assert all(torch.equal(result, wanted) for result in results)


def test_threads_do_not_see_each_others_block_inputs(packed):
    """Between a block's hook and its attention, another thread's call without a cache may begin."""
    runtime = packed.model.layers[0].self_attn.rotatekv
    one, other = torch.zeros(1, 2, 128), torch.ones(1, 2, 128)
    runtime.observe(packed.model.layers[0], (one,), {})
    thread = threading.Thread(target=lambda: runtime.observe(packed.model.layers[0], (other,), {}))
    thread.start()
    thread.join()
    assert runtime.take_residual(None) is one
    assert runtime.take_residual(None) is None


# Caches that do not belong here


def test_a_cache_of_the_untransformed_model(packed):
    cache = DynamicCache(config=packed.config)
    logits(zoo.shared("llama"), past_key_values=cache)
    assert type(cache.layers[0]) is DynamicLayer
    with pytest.raises(StateError, match="already holds 16-bit keys of an untransformed model"):
        logits(packed, past_key_values=cache)


def test_a_packed_cache_given_to_the_untransformed_model(packed):
    cache = DynamicCache(config=packed.config)
    logits(packed, past_key_values=cache)
    with pytest.raises(StateError, match="not transformed wrote to a packed cache layer"):
        logits(zoo.shared("llama"), past_key_values=cache)


def test_a_cache_that_offloads(packed):
    cache = (
        DynamicCache(config=packed.config, offloading=True) if torch.cuda.is_available() else DynamicCache()
    )
    cache.offloading = True
    with pytest.raises(StateError, match="offloads to the CPU.*use offloading=False"):
        logits(packed, past_key_values=cache)


def test_gradient_checkpointing_and_training_are_refused():
    model = copy.deepcopy(zoo.packed("llama", sinks=6))
    model.gradient_checkpointing_enable()
    with pytest.raises(StateError, match="for inference"):
        model.train()(zoo.prompt()[0])
