"""Models whose weights other libraries have quantized: rotations are applied online, and the report says why.

Each case needs its library (`pip install rotatekv-fx[quantized]`) and is skipped without.
"""

import importlib.util

import pytest
import torch
import zoo
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk

SETTINGS = {
    "none": {},
    "paper": {"sinks": 4},
    "centered": {"window": 4, "slack": 2, "sinks": 4},
}
# Methods that round activations too: rounding differences tip their codes over, and 8-bit keys do it as well.
ROUNDS_ACTIVATIONS = ("torchao, int8 activations", "bitsandbytes, 8 bits")


def torchao(name, **options):
    def load(folder):
        from torchao import quantization

        config = TorchAoConfig(getattr(quantization, name)(**options))
        return from_pretrained(folder, config)

    return load


def bitsandbytes(**options):
    return lambda folder: from_pretrained(folder, BitsAndBytesConfig(**options))


def hqq(folder):
    """By the library itself: transformers 5 does not load it for now."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    packed = HQQLinear(child, config, compute_dtype=torch.float32, device="cpu")
                    setattr(parent, name, packed)
    return model


def from_pretrained(folder, config):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


# method -> (package, how to load, what the report says of the weights)
METHODS = {
    "torchao, int8": ("torchao", torchao("Int8WeightOnlyConfig"), "type Int8Tensor"),
    "torchao, int4": (
        "torchao",
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
        "type IntxUnpackedToInt8Tensor",
    ),
    "torchao, float8": ("torchao", torchao("Float8WeightOnlyConfig"), "type Float8Tensor"),
    "torchao, int8 activations": (
        "torchao",
        torchao("Int8DynamicActivationInt8WeightConfig"),
        "type Int8Tensor",
    ),
    "bitsandbytes, 8 bits": ("bitsandbytes", bitsandbytes(load_in_8bit=True), "type Int8Params"),
    "bitsandbytes, 4 bits": ("bitsandbytes", bitsandbytes(load_in_4bit=True), "type Params4bit"),
    "hqq": ("hqq", hqq, "uint8"),
}


@pytest.fixture(scope="module", params=METHODS)
def loaded(request, tmp_path_factory):
    """(method, model, what the report says)."""
    package, load, weights = METHODS[request.param]
    for needed in (package, "accelerate"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    folder = tmp_path_factory.mktemp("model")
    zoo.build("qwen3", intermediate_size=128).save_pretrained(folder)
    model = load(folder).eval()
    model.generation_config.eos_token_id = None
    return request.param, model, weights


@torch.no_grad()
def logits(model):
    ids, mask = zoo.prompt()
    return model(ids, attention_mask=mask, position_ids=zoo.positions_of(mask)).logits


def tokens(model):
    ids, mask = zoo.prompt()
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("recipe", SETTINGS)
def test_rotations_are_online(loaded, recipe):
    method, model, weights = loaded
    expected, wanted = logits(model), tokens(model)
    calibration = None if recipe == "none" else zoo.calibrated(model)
    config = rk.RotateKVConfig(recipe=recipe, key_bits=8, value_bits=8, **SETTINGS[recipe])
    rk.transform(model, config, calibration)
    try:
        for site in rk.report(model).sites:
            assert site.merged == ()
            assert site.passes["insert_rotation"] == {"merged": 0, "online": 0 if recipe == "none" else 3}
            values, outputs = (f"{s}: {s}_proj is called as it is (weights of {weights})" for s in "vo")
            assert values in site.unmerged
            assert outputs in site.unmerged
        assert rk.report(model).originals_nbytes == 0
        found = tokens(model)
        assert found.shape == wanted.shape
        if recipe == "none" and method not in ROUNDS_ACTIVATIONS:
            assert torch.equal(found, wanted)
        close = 2e-5 if recipe == "none" else 0.04 if method in ROUNDS_ACTIVATIONS else 0.02
        assert zoo.relative(logits(model), expected) < close
    finally:
        rk.restore(model)
    assert torch.equal(logits(model), expected)


def test_a_calibration_serves_the_model_loaded_again(tmp_path):
    """Also where packed weights change their layout in the first forward, as 4-bit ones do on a CPU."""
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    zoo.build("llama", layers=1, intermediate_size=128).save_pretrained(tmp_path)
    load = METHODS["bitsandbytes, 4 bits"][1]
    calibration = zoo.calibrated(load(tmp_path).eval())
    packed = rk.transform(load(tmp_path).eval(), rk.RotateKVConfig(), calibration)
    assert len(rk.report(packed).sites) == 1
