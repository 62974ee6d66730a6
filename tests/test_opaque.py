"""Projections that are called as they are: quantized weights, hooks, wrappers. Rotations are then online."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx.calibration import Calibration, model_fingerprint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES = {
    "paper": {"sinks": 6},
    "centered": {"window": 4, "slack": 2, "sinks": 6},
}


@torch.no_grad()
def logits(model):
    ids, mask = zoo.prompt()
    return model(ids, attention_mask=mask, position_ids=zoo.positions_of(mask)).logits


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        codes = (linear.weight / scale).round().to(torch.int8).detach()
        self.codes = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.codes * self.scale)


class Float8Linear(nn.Linear):
    """A linear layer with 8-bit floating-point weights, whose scale is beside them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = nn.Parameter(linear.weight.detach().abs().amax() / 400)
        codes = (linear.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)

    @property
    def codes(self):
        return self.weight.float()

    def forward(self, x):
        return F.linear(x, self.codes * self.scale)


def quantize(model, kind=Int8Linear):
    for block in model.model.layers:
        for name in PROJECTIONS:
            setattr(block.self_attn, name, kind(getattr(block.self_attn, name)))


def wrap(model):
    for block in model.model.layers:
        for name in PROJECTIONS:
            linear = getattr(block.self_attn, name)
            linear.forward = lambda x, own=linear: F.linear(x, own.weight) * 1.5


def hook(model):
    for block in model.model.layers:
        for name in PROJECTIONS:
            getattr(block.self_attn, name).register_forward_hook(lambda module, args, out: out * 1.5)


def plain(model, factor=1.0):
    """The same model with ordinary weights."""
    copied = copy.deepcopy(model)
    for block in copied.model.layers:
        for name in PROJECTIONS:
            own = getattr(block.self_attn, name)
            weight = own.codes * own.scale if hasattr(own, "codes") else own.weight * factor
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            setattr(block.self_attn, name, linear)
    return copied


CHANGES = {
    "int8": (quantize, 1.0),
    "float8": (functools.partial(quantize, kind=Float8Linear), 1.0),
    "wrapped": (wrap, 1.5),
    "hooked": (hook, 1.5),
}
REASONS = {
    "int8": "weights of int8",
    "float8": "weights of float8_e4m3fn",
    "wrapped": "a forward of its own",
    "hooked": "hooks",
}


@pytest.fixture(scope="module", params=CHANGES)
def pair(request):
    """(a model with opaque projections, the same with ordinary ones, why)."""
    change, factor = CHANGES[request.param]
    model = zoo.build("llama")
    change(model)
    if factor == 1.0:
        ordinary = plain(model)
    else:
        ordinary = plain(zoo.build("llama"), factor)
    assert zoo.relative(logits(ordinary), logits(model)) < 1e-5
    return model, ordinary, REASONS[request.param]


def transformed(model, recipe, **settings):
    model = copy.deepcopy(model) if not any("forward" in vars(m) for m in model.modules()) else model
    calibration = None if recipe == "none" else zoo.calibrated(model)
    return rk.transform(model, rk.RotateKVConfig(recipe=recipe, **settings), calibration)


def test_recipe_none_changes_nothing(pair):
    model, *_ = pair
    expected = logits(model)
    packed = transformed(model, "none")
    torch.testing.assert_close(logits(packed), expected, rtol=0, atol=2e-5)
    rk.restore(packed)
    assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize("recipe", CASES)
def test_rotations_are_online_with_the_same_result(pair, recipe):
    """Up to the weights of o_proj, which recipe centered then does not know."""
    model, ordinary, reason = pair
    bits = {"key_bits": 8, "value_bits": 8}
    expected = logits(model)
    packed = transformed(model, recipe, **CASES[recipe], **bits)
    for site in rk.report(packed).sites:
        assert site.merged == ()
        assert site.unmerged == tuple(f"{s}: {s}_proj is called as it is ({reason})" for s in "kvo")
        assert site.passes["insert_rotation"] == {"merged": 0, "online": 3}
    assert rk.report(packed).originals_nbytes == 0
    assert zoo.relative(logits(packed), expected) < 0.02
    merged = transformed(ordinary, recipe, **CASES[recipe], **bits)
    assert zoo.relative(logits(packed), logits(merged)) < 0.02
    found = packed.generate(zoo.prompt()[0], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape[1] == 19
    rk.restore(packed)
    assert torch.equal(logits(packed), expected)


def test_the_submodules_come_back_when_an_export_fails(monkeypatch):
    model = zoo.build("llama", layers=1)
    quantize(model)
    before = list(model.model.layers[0].self_attn.children())

    def fails(*args, **options):
        assert not any(isinstance(m, Int8Linear) for m in model.model.layers[0].self_attn.children())
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(KeyboardInterrupt):
        rk.transform(model, rk.RotateKVConfig(recipe="none"))
    assert all(a is b for a, b in zip(model.model.layers[0].self_attn.children(), before, strict=True))


def test_a_calibration_serves_its_own_quantized_weights_alone():
    model, other = zoo.build("llama", layers=1), zoo.build("llama", layers=1)
    quantize(model)
    quantize(other)
    calibration = zoo.calibrated(model)
    calibration.check(other)
    assert isinstance(calibration, Calibration)
    other.model.layers[0].input_layernorm.weight.data += 1
    assert model_fingerprint(other) != calibration.fingerprint
