"""The Dynamo backend: transformed models compile as they are, untransformed ones get the passes inserted."""

import copy
import functools
import json
import logging
import os
import subprocess
import sys
import tomllib
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx.backend import insert, read_options, rotatekv
from rotatekv_fx.backend.insert import _warn_of_cache
from rotatekv_fx.errors import ConfigError, InputError

CLOSE_IN_CODES = 0.02  # a rotation applied online rounds otherwise than a merged one, and may flip a code
LONG = 90


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    _warn_of_cache.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_inductor(monkeypatch):
    """Runs graphs as they are where inductor would compile them; lists what it was given."""
    calls = []

    def compile_fx(module, inputs, config_patches):
        calls.append((module, config_patches, torch.compiler.config.cache_key_tag))
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return calls


@pytest.fixture(scope="module")
def calibration_file(tmp_path_factory):
    """Path of a model's calibration."""
    folder = tmp_path_factory.mktemp("calibrations")

    @functools.cache
    def path_of(name, layers=1):
        path = folder / f"{name}_{layers}.safetensors"
        zoo.shared_calibration(name, layers).save(path)
        return str(path)

    return path_of


def logits(forward, length=LONG, padding=(0, 4, 9), **options):
    """Logits of the real tokens in a forward without cache."""
    ids, mask = zoo.prompt(length=length, padding=padding)
    options = {"use_cache": False, "attention_mask": mask, "position_ids": zoo.positions_of(mask), **options}
    with torch.no_grad():
        return forward(ids, **options).logits[mask.bool()]


def compiled(model, options=None, **settings):
    return torch.compile(model, backend=rotatekv, fullgraph=True, options=options, **settings)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bit": 2}, "option 'key_bit' is unknown; use .*Did you mean 'key_bits'"),
        ({"triton.cudagraph": True}, "Did you mean 'triton.cudagraphs'"),
        ({"keep_originals": True}, r"option keep_originals belongs to transform\(\); leave it out"),
        ({"key_bits": 5}, "key_bits is 5; use one of"),
        ({"recipe": "papre"}, "recipe 'papre' is unknown; use one of"),
        ({"mode": "fast"}, "mode 'fast' is unknown; use one of .*reduce-overhead"),
        ({"calibration": 3}, "option calibration is a int; give the path of a file"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        read_options(options)


def test_options_are_sorted():
    given = {"recipe": "paper", "window": 3, "calibration": "c.safetensors", "mode": "reduce-overhead"}
    options = read_options({**given, "max-autotune": True})
    assert (options.config.recipe, options.config.window, str(options.calibration)) == (
        "paper",
        3,
        "c.safetensors",
    )
    assert options.inductor == {"triton.cudagraphs": True, "max_autotune": True}
    assert read_options(None, "reduce-overhead").inductor == {"triton.cudagraphs": True}
    assert read_options(None).inductor == {}


def test_errors_reach_the_caller_of_a_compiled_model():
    with pytest.raises(BackendCompilerFailed, match="ConfigError: option 'recipee' is unknown"):
        logits(compiled(zoo.shared("llama", 1), {"recipee": "paper"}))


def test_fingerprint_covers_config_and_calibration(tmp_path):
    file = tmp_path / "calibration"
    file.write_bytes(b"one")
    base = {"recipe": "paper", "calibration": file}
    prints = [
        read_options(o).fingerprint() for o in ({}, base, {**base, "key_bits": 3}, {**base, "sinks": 3})
    ]
    assert read_options({**base, "dump_dir": tmp_path}).fingerprint() == prints[1]
    file.write_bytes(b"two")
    prints.append(read_options(base).fingerprint())
    assert len(set(prints)) == 5


# Transformed models: their graphs hold our ops already


def generate(model, **options):
    ids, mask = zoo.prompt()
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )


def on_any_device(config):
    config._compile_all_devices = True
    return config


PACKED = {"paper": {}, "centered": {"window": 8, "slack": 4}}


@pytest.mark.parametrize("recipe", PACKED)
def test_static_decode_is_one_full_graph(recipe, eager_inductor):
    model = zoo.packed("llama", recipe, 1, sinks=4, **PACKED[recipe])
    static = {"cache_implementation": "static"}
    config = CompileConfig(backend=rotatekv, mode="reduce-overhead", fullgraph=True)
    expected = generate(model, **static, disable_compile=True)
    for _ in range(2):
        assert torch.equal(generate(model, **static, compile_config=on_any_device(config)), expected)
        assert len(eager_inductor) == 1
    ((_, patches, tag),) = eager_inductor
    assert patches == {"triton.cudagraphs": True}
    assert tag == f"rotatekv-{read_options(None).fingerprint()}"
    assert torch.compiler.config.cache_key_tag == ""


def test_generate_on_a_growing_cache_does_not_recompile(eager_inductor):
    model = copy.deepcopy(zoo.packed("llama", "centered", 1, sinks=4, **PACKED["centered"]))
    expected = generate(model)
    model.compile(backend=rotatekv, fullgraph=True)
    assert torch.equal(generate(model), expected)
    assert len(eager_inductor) == 3  # the prompt, the first token, and any later one
    assert torch.equal(generate(model), expected)
    assert len(eager_inductor) == 3


def test_a_call_of_the_compiled_model_itself(eager_inductor):
    model = zoo.packed("llama", "paper", 1, sinks=4)
    assert torch.equal(logits(compiled(model)), logits(model))
    assert len(eager_inductor) == 1


def test_reference_model_decodes_in_one_full_graph(reference_model, eager_inductor):
    model = rk.transform(copy.deepcopy(reference_model), rk.RotateKVConfig(recipe="quarot", window=16))
    ids = torch.arange(3, 43)[None]
    expected = decode(model, StaticCache(config=model.config, max_cache_len=128), ids, model)
    found = decode(model, StaticCache(config=model.config, max_cache_len=128), ids, compiled(model))
    assert len(eager_inductor) == 1
    assert zoo.relative(found, expected) < 1e-5


@torch.no_grad()
def decode(model, cache, ids, forward, prompt=32):
    """Logits of the tokens after the prompt, fed one by one to `forward`."""
    model(ids[:, :prompt], past_key_values=cache)
    steps = []
    for place in range(prompt, ids.shape[1]):
        position = torch.tensor([[place]], device=ids.device)
        step = forward(ids[:, place : place + 1], past_key_values=cache, position_ids=position)
        steps.append(step.logits.clone())
    return torch.cat(steps, 1)


def test_settings_for_a_transformed_model_are_refused():
    model = zoo.packed("llama", "paper", 1, sinks=4)
    with pytest.raises(
        BackendCompilerFailed, match="transformed already, so the options recipe, window have"
    ):
        logits(compiled(model, {"recipe": "paper", "window": 0}))


# Untransformed models, without a cache


@pytest.mark.parametrize(
    ("name", "recipe", "window"),
    [
        ("llama", "paper", 0),
        ("llama", "paper", 64),
        ("llama", "centered", 0),
        ("llama", "centered", 64),
        ("mistral", "centered", 6),  # sliding window
        ("qwen3", "paper", 6),  # key norm before RoPE
        ("gemma2", "centered", 6),  # arithmetic spelled out, soft-cap
        ("gpt_oss", "centered", 6),  # sink logits
    ],
)
def test_logits_are_those_of_the_transformed_model(name, recipe, window, calibration_file, eager_inductor):
    model, packed = zoo.shared(name, 1), zoo.packed(name, recipe, 1, sinks=6, window=window)
    options = {"recipe": recipe, "window": window, "sinks": 6, "calibration": calibration_file(name)}
    found, expected = logits(compiled(model, options)), logits(packed)
    assert zoo.relative(found, expected) < CLOSE_IN_CODES
    assert zoo.relative(expected, logits(model)) > 3 * CLOSE_IN_CODES


@pytest.mark.parametrize("window", [0, 8])
def test_without_rotation_the_numbers_are_the_same(window, eager_inductor):
    model, packed = zoo.shared("llama"), zoo.transformed(zoo.shared("llama"), "rtn", window=window)
    found = logits(compiled(model, {"recipe": "rtn", "window": window}))
    assert zoo.relative(found, logits(packed)) < 1e-5


def test_several_layers_at_8_bits(calibration_file, eager_inductor):
    settings = {"recipe": "centered", "key_bits": 8, "value_bits": 8, "window": 8}
    model = zoo.shared("llama")
    packed = zoo.transformed(model, calibration=zoo.shared_calibration("llama"), **settings)
    options = {**settings, "calibration": calibration_file("llama", 2)}
    assert zoo.relative(logits(compiled(model, options)), logits(packed)) < 1e-3


def test_the_mask_may_be_left_out(calibration_file, eager_inductor):
    model, packed = zoo.shared("llama", 1), zoo.packed("llama", "centered", 1, sinks=6, window=6)
    options = {"window": 6, "sinks": 6, "calibration": calibration_file("llama")}
    plain = {"attention_mask": None, "position_ids": None, "padding": (0, 0, 0)}
    found = logits(compiled(model, options), **plain)
    assert zoo.relative(found, logits(packed, **plain)) < CLOSE_IN_CODES


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_length_is_one_more_graph_at_most(dynamic, calibration_file, eager_inductor):
    model, packed = zoo.shared("llama", 1), zoo.packed("llama", "centered", 1, sinks=6, window=6)
    options = {"window": 6, "sinks": 6, "calibration": calibration_file("llama")}
    forward = compiled(model, options, dynamic=dynamic)
    for length in (24, 31, 40, 17):
        found = logits(forward, length, (0, 3, 1))
        assert zoo.relative(found, logits(packed, length, (0, 3, 1))) < CLOSE_IN_CODES
    assert len(eager_inductor) == (1 if dynamic else 2)


@pytest.mark.parametrize(("name", "length"), [("llama", 2), ("gpt_neox", 4), ("gptj", 4), ("falcon", 1)])
def test_as_many_tokens_as_kv_heads(name, length, calibration_file, eager_inductor):
    """Two axes of the keys are then alike."""
    model, packed = zoo.shared(name, 1), zoo.packed(name, "paper", 1, sinks=1)
    assert rk.report(packed).sites[0].kv_heads == length
    options = {"recipe": "paper", "sinks": 1, "calibration": calibration_file(name)}
    found = logits(compiled(model, options), length, (0, 0, 0))
    assert zoo.relative(found, logits(packed, length, (0, 0, 0))) < CLOSE_IN_CODES
    assert zoo.relative(found, logits(model, length, (0, 0, 0))) > 3 * CLOSE_IN_CODES


def test_parameters_stay_inputs(eager_inductor):
    """A weight that changes after the compilation changes the numbers."""
    model = copy.deepcopy(zoo.shared("llama", 1))
    forward = compiled(model, {"recipe": "quarot"})
    logits(forward)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-0.5)
    packed = zoo.transformed(model, "quarot")
    assert zoo.relative(logits(forward), logits(packed)) < CLOSE_IN_CODES
    assert len(eager_inductor) == 1


def test_counts_and_dumps(tmp_path, calibration_file):
    found = []

    options = {"recipe": "paper", "calibration": calibration_file("llama", 2), "dump_dir": str(tmp_path)}

    def backend(module, inputs):
        found.append(insert(module, read_options(options)))
        return module.forward

    logits(torch.compile(zoo.shared("llama"), backend=backend))
    ((counts),) = found
    assert sorted(counts) == [0, 1]
    assert counts[1]["insert_rotation"] == {"merged": 0, "online": 3}
    assert counts[1]["insert_quantization"] == {"quantized": 2}
    assert counts[1]["preserve_sinks"] == {"restored": 2}
    assert counts[1]["lower_without_cache"] == {"attend": 1, "inline": 0}
    assert "rotatekv.quantize" in (tmp_path / "layer_01" / "06_cleanup.txt").read_text()


# What does not match is never silent


def test_a_missing_calibration_names_the_option():
    with pytest.raises(
        BackendCompilerFailed, match="'centered' needs a calibration; give options={'calibration'"
    ):
        logits(compiled(zoo.shared("llama", 1)))


def test_a_calibration_of_other_shapes_is_refused(calibration_file):
    options = {"calibration": calibration_file("gptj")}
    with pytest.raises(BackendCompilerFailed, match=r"CalibrationError: layer 0 has \[2, 32\] key heads"):
        logits(compiled(zoo.shared("llama", 1), options))


class Attention(nn.Module):
    """Bare attention of one layer over [B, S, 64], in several spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkvo"})
        self.spelling = spelling

    def forward(self, x):
        query, key, value = (
            self.projections[n](x).unflatten(-1, (2, 32)).transpose(1, 2) for n in ("q", "k", "v")
        )
        if self.spelling == "biased":
            scores = query @ key.transpose(-1, -2) * 32**-0.5
            attended = torch.softmax(scores * torch.sigmoid(scores), -1) @ value
        else:
            causal = self.spelling != "seeing all"
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
            if self.spelling == "twice":
                attended = attended + F.scaled_dot_product_attention(query, key, value)
        return self.projections["o"](attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(OrderedDict(only=Attention("plain"))), "no numbered block encloses only"),
        (Attention("plain"), "the attention was traced outside of any module"),
        (nn.Sequential(Attention("seeing all")), "its attention is not causal"),
        (
            nn.Sequential(OrderedDict((name, nn.Sequential(Attention("plain"))) for name in ("one", "two"))),
            "2 attention modules are in blocks of this number",
        ),
        (nn.Sequential(Attention("twice")), "several attentions in one module, expected 1"),
        (nn.Sequential(Attention("biased")), "the scores are no scaled product of queries and keys"),
    ],
)
def test_attention_that_does_not_match_is_logged_and_left(model, reason, eager_inductor, caplog):
    x = torch.randn(2, 9, 64)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "rotatekv_fx"):
        found = compiled(model, {"recipe": "rtn"})(x)
    assert torch.equal(found, model(x))
    assert any(reason in record.getMessage() and "[node " in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("layers", [1, 2])
def test_bare_attention_in_numbered_blocks_matches(layers, eager_inductor):
    """The second reads what the first returns."""
    model, x = nn.Sequential(*[Attention("plain") for _ in range(layers)]), torch.randn(2, 9, 64)
    with torch.no_grad():
        exact, found = model(x), compiled(model, {"recipe": "rtn", "key_bits": 8, "value_bits": 8})(x)
    assert 0.0 < zoo.relative(found, exact) < 0.01


# Untransformed models, with a cache of transformers


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_transformers_stays_as_it_is_with_one_warning(name, static, eager_inductor, caplog):
    model = zoo.shared(name, 1)
    forward = compiled(model, {"recipe": "rtn"})
    results = []
    with caplog.at_level(logging.WARNING, "rotatekv_fx"):
        for call in (model, forward):
            cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
            first = logits(call, 14, (0, 0, 0), past_key_values=cache, use_cache=True, attention_mask=None)
            position = torch.full((3, 1), 14)
            with torch.no_grad():
                second = call(torch.tensor([[5], [6], [7]]), past_key_values=cache, position_ids=position)
            results.append((first, second.logits))
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    messages = [r.getMessage() for r in caplog.records]
    assert sum("belongs to transformers and stays in 16 bit" in m for m in messages) == 1
    assert len(messages) == 1


# Inductor, its cache, and the entry point

PROCESS = """
import json, sys, torch
from torch._dynamo.utils import counters
from test_backend import block
torch.set_num_threads(1)
model, x = block()
with torch.no_grad():
    found = torch.compile(model, backend="rotatekv", fullgraph=True, options=json.loads(sys.argv[1]))(x)
torch.save((found, dict(counters["inductor"])), sys.argv[2])
"""


def block():
    """Small enough to go through inductor in a few seconds; its heads are those of the llama."""
    torch.manual_seed(0)
    return nn.Sequential(Attention("plain")), torch.randn(2, 9, 64)


@pytest.fixture
def installed(repository, tmp_path):
    """Environment of a process in which the package's entry points are installed."""
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path / "site" / "rotatekv_fx_of_the_test-0.dist-info"
    folder.mkdir(parents=True)
    points = [f"{name} = {value}" for name, value in declared["torch_dynamo_backends"].items()]
    (folder / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *points]))
    (folder / "METADATA").write_text("Name: rotatekv_fx_of_the_test\nVersion: 0\n")
    path = os.pathsep.join(str(p) for p in (repository, repository / "tests", folder.parent))
    own = {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    return {**os.environ, **own, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def test_processes_that_share_a_cache_folder_get_their_own_numbers(
    installed, calibration_file, tmp_path, eager_inductor
):
    """They differ in the calibration alone, and take the backend by its entry point."""
    other = tmp_path / "other.safetensors"
    rk.calibrate(zoo.shared("llama", 1), zoo.windows(seed=9), progress=zoo.quiet).save(other)
    model, x = block()
    results = []
    for number, file in enumerate((calibration_file("llama"), other)):
        options = {"window": 0, "sinks": 0, "calibration": str(file)}
        out = tmp_path / f"{number}.pt"
        command = [sys.executable, "-c", PROCESS, json.dumps(options), str(out)]
        subprocess.run(command, check=True, env=installed, capture_output=True, timeout=300)
        found, inductor = torch.load(out)
        with torch.no_grad():
            expected = compiled(model, options)(x)
        assert zoo.relative(found, expected) < CLOSE_IN_CODES
        assert (inductor.get("fxgraph_cache_miss"), inductor.get("fxgraph_cache_hit")) == (1, None)
        results.append(found)
    assert zoo.relative(*results) > 3 * CLOSE_IN_CODES


@pytest.mark.slow
def test_inductor_compiles_static_decode():
    model = zoo.packed("llama", "centered", 1, sinks=4, **PACKED["centered"])
    ids = zoo.prompt(batch=2, length=18, padding=(0, 0))[0]
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    expected = decode(model, caches[0], ids, model, prompt=14)
    found = decode(model, caches[1], ids, compiled(model), prompt=14)
    assert zoo.relative(found, expected) < CLOSE_IN_CODES
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 1


def test_the_backend_can_be_reset():
    rotatekv.reset()


def test_nothing_is_trained_through_our_ops(calibration_file, recwarn):
    """Without no_grad a forward is as quiet, and backward says so, where gradients would be missing."""
    model, ids = copy.deepcopy(zoo.shared("llama", 1)), zoo.prompt(padding=(0, 0, 0))[0]
    forward = compiled(model, {"recipe": "paper", "calibration": calibration_file("llama")})
    output = forward(ids, use_cache=False, labels=ids)
    assert not any("autograd" in str(w.message) for w in recwarn)
    with pytest.raises(RuntimeError, match="does not require grad"):
        output.loss.backward()
    assert model.get_input_embeddings().weight.grad is None


def test_an_untouched_model_can_be_trained():
    model, ids = copy.deepcopy(zoo.shared("llama", 1)), zoo.prompt(padding=(0, 0, 0))[0]
    compiled(model, {"recipe": "none", "window": 0})(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("calibrates", [True, False])
def test_a_model_that_was_compiled_first(calibrates):
    """Hooks record its calls, and a compiled call runs none."""
    model, ids = copy.deepcopy(zoo.shared("llama", 1)), zoo.prompt(padding=(0, 0, 0))[0]
    model.compile(backend=rotatekv, fullgraph=True)
    calibration = zoo.calibrated(model) if calibrates else zoo.shared_calibration("llama", 1)
    rk.transform(model, rk.RotateKVConfig(recipe="paper"), calibration)
    with torch.no_grad():
        expected = zoo.packed("llama", layers=1)(ids, use_cache=False).logits
        assert zoo.relative(model(ids, use_cache=False).logits, expected) < 1e-4
    with pytest.raises(InputError, match="give the model itself"):
        rk.transform(torch.compile(zoo.build("llama", 1), backend="eager"))


# CUDA graphs


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("recipe", ["none", "paper", "centered"])
def test_static_decode_with_cuda_graphs(recipe):
    """One graph, replayed for every token, with the numbers of the uncompiled model."""
    model = copy.deepcopy(zoo.packed("llama", recipe, sinks=4, **PACKED.get(recipe, {}))).cuda()
    ids = zoo.prompt(batch=2, length=60, padding=(0, 0))[0].cuda()
    forward = torch.compile(model, backend=rotatekv, fullgraph=True, mode="reduce-overhead")
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    expected = decode(model, caches[0], ids, model)
    found = decode(model, caches[1], ids, forward)
    assert zoo.relative(found, expected) < (1e-4 if recipe == "none" else CLOSE_IN_CODES)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@gpu
@needs_cuda
def test_generate_with_cuda_graphs():
    model = copy.deepcopy(zoo.packed("llama", "none")).cuda()
    ids, mask = (t.cuda() for t in zoo.prompt())
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["cache_implementation"] = "static"
    expected = model.generate(ids, **options, disable_compile=True)
    config = CompileConfig(backend=rotatekv, mode="reduce-overhead", fullgraph=True)
    assert torch.equal(model.generate(ids, **options, compile_config=config), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@gpu
@needs_cuda
def test_untransformed_model_with_cuda_graphs(calibration_file):
    model, packed = (copy.deepcopy(m).cuda() for m in (zoo.shared("llama", 1), zoo.packed("llama", layers=1)))
    options = {"recipe": "paper", "calibration": calibration_file("llama"), "mode": "reduce-overhead"}
    ids = zoo.prompt(padding=(0, 0, 0))[0].cuda()
    forward = compiled(model, options)
    with torch.no_grad():
        expected = packed(ids, use_cache=False).logits
        for _ in range(3):
            found = forward(ids, use_cache=False).logits.clone()
            assert zoo.relative(found, expected) < CLOSE_IN_CODES
    assert counters["inductor"]["cudagraph_skips"] == 0
