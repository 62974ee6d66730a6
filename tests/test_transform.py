"""transform and restore: a model is changed as reported, put back bit for bit, or left alone."""

import copy
import types

import pytest
import torch
import zoo
from torch import nn
from torch._subclasses import FakeTensor
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx import Calibration, RotateKVConfig, api
from rotatekv_fx.calibration import model_fingerprint
from rotatekv_fx.errors import CalibrationError, ConfigError, InputError, MatchError, StateError

FOLDED = ("k_proj.weight", "v_proj.weight", "o_proj.weight")


@torch.no_grad()
def logits(model, **options):
    ids, mask = zoo.prompt()
    return model(ids, attention_mask=mask, position_ids=zoo.positions_of(mask), **options).logits


def anatomy(model):
    """Everything that a transform may add to a model's modules, but for what `generate` remembers."""
    return {
        name: (
            type(module),
            set(vars(module)) - {"_previous_max_cache_length"},
            set(module._modules),
            set(module._buffers),
            set(module._parameters),
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }


class Snapshot:
    """A model before something happens to it."""

    def __init__(self, model):
        self.model, self.anatomy, self.config = model, anatomy(model), copy.deepcopy(model.config.to_dict())
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.gradients = {name: p.requires_grad for name, p in model.named_parameters()}
        self.implementation, self.logits = model.config._attn_implementation, logits(model)
        self.state_keys = list(model.state_dict())

    def assert_unchanged(self):
        model = self.model
        assert anatomy(model) == self.anatomy
        assert model.config.to_dict() == self.config
        assert model.config._attn_implementation == self.implementation
        assert list(model.state_dict()) == self.state_keys
        parameters = dict(model.named_parameters())
        assert list(parameters) == list(self.parameters)
        assert all(torch.equal(parameters[name], before) for name, before in self.parameters.items())
        assert {name: p.requires_grad for name, p in parameters.items()} == self.gradients
        assert torch.equal(logits(model), self.logits)


def paper(name="llama", **settings):
    """A transformed model that the caller may change."""
    return copy.deepcopy(zoo.packed(name, **settings))


# What a transform changes


def test_transform_returns_the_same_object():
    model = zoo.build("llama", layers=1)
    assert rk.transform(model, RotateKVConfig(recipe="none")) is model
    assert rk.restore(model) is model


@pytest.mark.parametrize(
    ("name", "layers", "folded"),
    [
        ("llama", 2, FOLDED),
        ("qwen3", 1, FOLDED[1:]),
        ("gpt_neox", 1, ("query_key_value.weight", "query_key_value.bias", "dense.weight")),
    ],
)
def test_only_folded_weights_change(name, layers, folded):
    model, packed = zoo.shared(name, layers), zoo.packed(name, layers=layers, sinks=6)
    before, after = model.state_dict(), packed.state_dict()
    marks = {f"{site.name}.rotatekv.merged.mark" for site in rk.report(packed).sites}
    assert set(after) == set(before) | marks
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    modules = [site.name for site in rk.report(packed).sites]
    assert changed == {f"{module}.{weight}" for module in modules for weight in folded}
    assert all(after[key].dtype == before[key].dtype for key in before)


def test_size_of_the_kept_originals_is_reported():
    packed = zoo.packed("llama", sinks=6)
    one_layer = 4 * 128 * (64 + 64 + 128)
    assert rk.report(packed).originals_nbytes == 2 * one_layer
    assert rk.report(zoo.packed("llama", "none")).originals_nbytes == 0


def test_no_fake_tensors_stay_on_the_model():
    seen, pending = set(), [zoo.packed("llama", sinks=6)]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        assert not isinstance(item, FakeTensor)
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            pending += item
        elif isinstance(item, nn.Module) or type(item).__module__.startswith("rotatekv_fx"):
            pending += vars(item).values()
        cells = getattr(getattr(item, "__func__", item), "__closure__", None) or ()
        pending += [cell.cell_contents for cell in cells]
    assert len(seen) > 100


def test_weights_with_frozen_gradients_stay_frozen():
    model = zoo.build("llama", layers=1).requires_grad_(False)
    snapshot = Snapshot(model)
    rk.transform(model, RotateKVConfig(recipe="paper"), zoo.shared_calibration("llama", 1))
    assert not any(p.requires_grad for p in model.parameters())
    rk.restore(model)
    snapshot.assert_unchanged()


# restore


@pytest.mark.parametrize(
    ("name", "layers", "sinks"),
    [("llama", 2, 0), ("llama", 2, 6), ("qwen3", 1, 6), ("gpt_neox", 1, 6), ("gptj", 1, 6)],
)
def test_restore_is_bit_for_bit(name, layers, sinks):
    model = zoo.shared(name, layers)
    restored = rk.restore(paper(name, layers=layers, sinks=sinks))
    assert anatomy(restored) == anatomy(model)
    found, expected = restored.state_dict(), model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(restored), logits(model))
    assert restored.config.to_dict() == model.config.to_dict()
    with pytest.raises(StateError, match="is not transformed"):
        rk.report(restored)


def test_in_place_round_trip():
    snapshot = Snapshot(zoo.build("llama", layers=1))
    calibration = zoo.shared_calibration("llama", 1)
    for sinks in (6, 0):
        rk.transform(snapshot.model, RotateKVConfig(recipe="paper", sinks=sinks), calibration)
        assert zoo.relative(logits(snapshot.model), snapshot.logits) > 0.1
        rk.restore(snapshot.model)
        snapshot.assert_unchanged()


def test_a_forward_put_there_by_others_comes_back():
    model = zoo.build("llama", layers=1)
    attention, called = model.model.layers[0].self_attn, []
    own = attention.forward

    def wrapped(*args, **kwargs):
        called.append(1)
        return own(*args, **kwargs)

    attention.forward = wrapped
    rk.transform(model, RotateKVConfig(recipe="none"))
    rk.restore(model)
    assert attention.forward is wrapped
    before = len(called)
    logits(model)
    assert len(called) == before + 1


def test_hooks_of_others_stay():
    model = zoo.build("llama", layers=1)
    called = []
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda *a: called.append(1))
    rk.transform(model, RotateKVConfig(recipe="paper", sinks=3), zoo.shared_calibration("llama", 1))
    called.clear()
    logits(model)
    rk.restore(model)
    logits(model)
    assert len(called) == 2
    assert len(block._forward_pre_hooks) == 1


def test_restore_without_originals():
    model = zoo.build("llama", layers=1)
    config = RotateKVConfig(recipe="paper", keep_originals=False)
    rk.transform(model, config, zoo.shared_calibration("llama", 1))
    assert rk.report(model).originals_nbytes == 0
    packed = logits(model)
    with pytest.raises(StateError, match="keep_originals=False"):
        rk.restore(model)
    assert torch.equal(logits(model), packed)


@pytest.mark.parametrize("call", [rk.restore, rk.report])
def test_an_untransformed_model_has_nothing_to_restore_or_report(call):
    with pytest.raises(StateError, match="LlamaForCausalLM is not transformed; call rotatekv_fx.transform"):
        call(zoo.shared("llama"))


# Deep copies


def test_a_deep_copy_of_a_transformed_model_is_independent():
    packed = paper(sinks=6)
    expected, copied = logits(packed), copy.deepcopy(packed)
    assert torch.equal(logits(copied), expected)
    assert not {id(m) for m in packed.modules()} & {id(m) for m in copied.modules()}
    own, other = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (packed, copied))
    assert not own & other
    rk.restore(packed)
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(packed), logits(zoo.shared("llama")))
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(rk.restore(copied)), logits(zoo.shared("llama")))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("phi3_longrope", {"key_bits": 8, "value_bits": 8, "sinks": 0}), ("gemma3_text", {"sinks": 0})],
)
def test_a_deep_copy_asks_its_own_rotary_embedding(name, settings):
    packed = paper(name, **settings)
    copied = copy.deepcopy(packed)
    expected = logits(copied)
    with torch.no_grad():
        for buffer in packed.buffers():
            if buffer.is_floating_point():
                buffer.zero_()
    assert torch.equal(logits(copied), expected)


# A transform that fails leaves the model as it was


class Failure(Exception):
    pass


@pytest.mark.parametrize(("error", "keep_originals"), [(Failure, True), (KeyboardInterrupt, False)])
def test_failing_on_the_second_layer(monkeypatch, error, keep_originals):
    snapshot, bind, bound = Snapshot(zoo.build("llama")), api.bind, []
    calibration = zoo.shared_calibration("llama")

    def second_fails(*args):
        if bound:
            raise error
        bound.append(bind(*args))
        assert hasattr(snapshot.model.model.layers[0].self_attn, "rotatekv")
        return bound[-1]

    monkeypatch.setattr(api, "bind", second_fails)
    config = RotateKVConfig(recipe="paper", sinks=6, keep_originals=keep_originals)
    with pytest.raises(error):
        rk.transform(snapshot.model, config, calibration)
    assert len(bound) == 1
    snapshot.assert_unchanged()


@pytest.mark.parametrize("error", [KeyboardInterrupt])
def test_failing_inside_the_binding_of_a_layer(monkeypatch, error):
    """The block's hook is the last thing that is put there."""
    snapshot = Snapshot(zoo.build("llama"))
    register = nn.Module.register_forward_pre_hook

    def fails(module, hook, **options):
        if module is snapshot.model.model.layers[1] and isinstance(hook, types.MethodType):
            assert hasattr(module.self_attn, "rotatekv")
            raise error
        return register(module, hook, **options)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fails)
    with pytest.raises(error):
        rk.transform(snapshot.model, RotateKVConfig(recipe="paper", sinks=6), zoo.shared_calibration("llama"))
    snapshot.assert_unchanged()


@pytest.mark.parametrize("where", ["run_passes", "collect"])
def test_failing_before_anything_is_bound(monkeypatch, where):
    snapshot = Snapshot(zoo.build("llama", layers=1))

    def fails(*args, **kwargs):
        raise Failure

    monkeypatch.setattr(api, where, fails)
    with pytest.raises(Failure):
        rk.transform(snapshot.model, RotateKVConfig(recipe="paper"))
    snapshot.assert_unchanged()


# States that are refused


def test_transforming_twice():
    packed = paper(sinks=6)
    expected = logits(packed)
    for call in (rk.transform, rk.inspect_model, rk.calibrate):
        with pytest.raises(StateError, match="transformed already; call rotatekv_fx.restore"):
            call(packed)
    assert torch.equal(logits(packed), expected)


def test_training_mode():
    model = zoo.build("llama", layers=1).train()
    for call in (rk.transform, rk.calibrate, rk.inspect_model):
        with pytest.raises(StateError, match="training mode; call model.eval"):
            call(model)
    packed = paper(sinks=6).train()
    with pytest.raises(StateError, match=r"call model.eval\(\)"):
        logits(packed)
    assert torch.equal(logits(packed.eval()), logits(zoo.packed("llama", sinks=6)))


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half()]
)
def test_another_dtype_after_the_transform(convert):
    packed = paper(sinks=6)
    convert(packed)
    with pytest.raises(StateError, match="was transformed in torch.float32 and now runs in"):
        logits(packed)
    restored, expected = rk.restore(packed), convert(copy.deepcopy(zoo.shared("llama")))
    for found, wanted in zip(restored.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype):
    """Eight bits and exact sinks move the logits no further than a few rounding steps of the dtype."""
    model = zoo.build("llama", layers=1, dtype=dtype)
    packed = zoo.transformed(model, calibration=zoo.calibrated(model), key_bits=8, value_bits=8)
    assert zoo.relative(logits(packed).double(), logits(model).double()) < 0.05
    exact = zoo.transformed(model, "none")
    assert zoo.relative(logits(exact).double(), logits(model).double()) < 1e-6
    cache = packed(zoo.prompt()[0]).past_key_values
    expected = torch.float16 if dtype is torch.float64 else dtype
    assert cache.layers[0].sinks.keys.dtype is expected
    assert all(p.dtype is dtype for p in packed.parameters())


def test_moving_to_the_dtype_it_has_changes_nothing():
    model = zoo.build("llama", layers=1, dtype=torch.bfloat16, num_key_value_heads=4)
    packed = zoo.transformed(model, calibration=zoo.calibrated(model), sinks=0)
    expected = logits(packed)
    assert torch.equal(logits(packed.to(torch.bfloat16)), expected)
    assert torch.equal(logits(packed.to("cpu", torch.bfloat16)), expected)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_implementations_whose_masks_cannot_be_read(implementation):
    model = zoo.build("llama", layers=1)
    model.config._attn_implementation_internal = implementation
    for call in (rk.transform, rk.calibrate, rk.inspect_model):
        with pytest.raises(ConfigError, match=r"set_attn_implementation\('sdpa'\)") as caught:
            call(model)
        assert repr(implementation) in str(caught.value)


def test_eager_attention():
    model = zoo.build("gpt_oss", layers=1)
    model.set_attn_implementation("eager")
    expected = logits(model)
    packed = zoo.transformed(model, "none")
    torch.testing.assert_close(logits(packed), expected, rtol=0, atol=2e-5)
    assert all(site.attention == "attend" for site in rk.report(packed).sites)


@pytest.mark.parametrize("found", [nn.Linear(2, 2), "a model", None])
def test_what_is_no_model_of_transformers(found):
    with pytest.raises(InputError, match="expected a transformers model, got"):
        rk.transform(found)


# Rejected layers


def test_no_match_is_an_error_that_lists_the_reasons():
    snapshot = Snapshot(zoo.build("deepseek_v3", layers=1))
    config = RotateKVConfig(recipe="none", allow_partial=True)
    for call in (lambda m: rk.transform(m, config), lambda m: rk.calibrate(m, zoo.windows())):
        with pytest.raises(MatchError) as caught:
            call(snapshot.model)
        message = str(caught.value)
        assert message.startswith("1 of 1 attention modules of DeepseekV3ForCausalLM rejected")
        assert "layer 0 (model.layers.0.self_attn): the value depends on" in message
        assert "[node cat" in message
    snapshot.assert_unchanged()


def test_inspect_shows_rejections_without_an_error():
    (rejection,) = rk.inspect_model(zoo.shared("deepseek_v3", 1)).rejections
    assert rejection.name == "model.layers.0.self_attn"


class Odd(LlamaAttention):
    """Its values depend on positions."""

    def forward(self, hidden_states, position_embeddings, **kwargs):
        turned = hidden_states + position_embeddings[0].mean(-1, keepdim=True)
        return super().forward(turned, position_embeddings=position_embeddings, **kwargs)


@pytest.fixture(scope="module")
def partly_odd():
    model = zoo.build("llama")
    model.model.layers[0].self_attn.__class__ = Odd
    return model


def test_a_partial_match_is_an_error_that_says_what_to_do(partly_odd):
    snapshot = Snapshot(partly_odd)
    with pytest.raises(MatchError, match="1 of 2 attention modules") as caught:
        rk.transform(partly_odd, RotateKVConfig(recipe="none"))
    assert "allow_partial=True transforms the others" in str(caught.value)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("recipe", ["none", "paper"])
def test_allow_partial_transforms_the_others(partly_odd, recipe):
    calibration = zoo.calibrated(partly_odd) if recipe == "paper" else None
    settings = {} if recipe == "none" else {"key_bits": 8, "value_bits": 8}
    packed = zoo.transformed(partly_odd, recipe, calibration, allow_partial=True, **settings)
    found = rk.report(packed)
    assert [site.layer_index for site in found.sites] == [1]
    assert [(r.layer_index, r.name) for r in found.rejections] == [(0, "model.layers.0.self_attn")]
    ids, mask = zoo.prompt()
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
        options |= {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True}
        output = packed.generate(ids, **options)
        if recipe == "none":
            assert torch.equal(output.sequences, partly_odd.generate(ids, **options).sequences)
        kinds = [type(layer).__name__.startswith("Packed") for layer in output.past_key_values.layers]
        assert kinds == [False, True]
    tolerance = 2e-5 if recipe == "none" else 0.05
    assert zoo.relative(logits(packed), logits(partly_odd)) < tolerance
    restored = rk.restore(packed)
    assert torch.equal(logits(restored), logits(partly_odd))


# Settings that do not fit the model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "papre"}, "recipe 'papre' is unknown; use one of"),
        ({"recipe": "paper", "group_size": 48}, "group_size 48 does not divide the 64 channels"),
        ({"recipe": "paper", "head_group": 4}, "head_group 4 does not divide the 2 KV heads"),
        ({"layers": {0: {"group_size": 48}}}, "layer 0: group_size 48 does not divide the 64 channels"),
        (
            {"layers": {0: {"key_bits": 4}, 9: {"key_bits": 8}}},
            r"settings for layer 9, and the model's attention layers are \[0\]; leave it out",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    snapshot = Snapshot(zoo.build("llama", layers=1))
    with pytest.raises(ConfigError, match=message):
        rk.transform(snapshot.model, RotateKVConfig(**settings), zoo.shared_calibration("llama", 1))
    snapshot.assert_unchanged()


def test_calibration_of_another_model():
    snapshot = Snapshot(zoo.build("llama", layers=1, seed=1))
    other = zoo.shared_calibration("llama")
    with pytest.raises(CalibrationError, match="belongs to another model"):
        rk.transform(snapshot.model, RotateKVConfig(recipe="paper"), other)
    snapshot.assert_unchanged()


# Shared parameters


def tie(model):
    """Let the second layer share the first one's projections."""
    first, second = (layer.self_attn for layer in model.model.layers)
    second.k_proj, second.v_proj, second.o_proj = first.k_proj, first.v_proj, first.o_proj
    return model


def untie(model):
    copied = copy.deepcopy(model)
    second = copied.model.layers[1].self_attn
    second.k_proj, second.v_proj, second.o_proj = (
        copy.deepcopy(p) for p in (second.k_proj, second.v_proj, second.o_proj)
    )
    return copied


def test_nothing_is_merged_into_shared_parameters():
    """Their rotation is applied online, with the same result as one merged into parameters of their own."""
    shared = tie(zoo.build("llama"))
    own = untie(shared)
    expected = logits(shared)
    assert torch.equal(logits(own), expected)
    layers = zoo.calibrated(own).layers
    packed = [
        zoo.transformed(model, calibration=Calibration(layers, model_fingerprint(model), ""), sinks=0)
        for model in (shared, own)
    ]
    counts = [rk.report(m).sites[1].passes["insert_rotation"] for m in packed]
    assert counts == [{"merged": 0, "online": 3}, {"merged": 3, "online": 0}]
    assert rk.report(packed[0]).originals_nbytes == 0
    online, merged = (logits(m) for m in packed)
    assert zoo.relative(online, merged) < 0.02 < 0.1 < zoo.relative(merged, expected)
    assert all(torch.equal(a, b) for a, b in zip(packed[0].parameters(), shared.parameters(), strict=True))
    assert torch.equal(logits(rk.restore(packed[0])), expected)


def test_tied_embeddings_are_no_obstacle():
    model = zoo.build("llama", layers=1, tie_word_embeddings=True)
    packed = zoo.transformed(model, calibration=zoo.calibrated(model))
    assert rk.report(packed).sites[0].passes["insert_rotation"] == {"merged": 3, "online": 0}
    assert packed.lm_head.weight is packed.model.embed_tokens.weight


# inspect_model


def test_inspect_leaves_the_model_alone():
    snapshot = Snapshot(zoo.build("gemma2", layers=1))
    found = rk.inspect_model(snapshot.model)
    assert [site.layer_index for site in found.sites] == [0]
    assert all(site.passes == {} and site.lowered == {} for site in found.sites)
    assert found.config is None
    snapshot.assert_unchanged()


def test_a_forward_that_fails_leaves_nothing_behind():
    """The next call must not see the block's input of a call that broke off."""
    packed = paper(sinks=6)
    expected = logits(packed)
    attention = packed.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed(zoo.prompt()[0][:, :5], use_cache=False)
    handle.remove()
    assert torch.equal(logits(packed), expected)
