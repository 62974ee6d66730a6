"""Tracing: attention modules are found by running the model, and the model is left as it was."""

import copy

import pytest
import torch
import zoo
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import one_thread  # noqa: F401

from rotatekv_fx.capture import Capture, CaptureFailure, capture, lookup
from rotatekv_fx.errors import InputError
from rotatekv_fx.sites import ATTENTION, KV_UPDATE

TRACED = (
    "llama",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "falcon",
    "olmo2",
    "cohere",
    "glm",
    "gpt_oss",
    "smollm3",
    "gptj",
)
MODULES = {
    "gpt_neox": ("gpt_neox.layers.0", "gpt_neox.layers.0.attention"),
    "falcon": ("transformer.h.0", "transformer.h.0.self_attention"),
    "gptj": ("transformer.h.0", "transformer.h.0.attn"),
}


def nodes(graph, target):
    return graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("name", TRACED)
def test_each_attention_module_is_captured_once(name):
    model, captures = zoo.shared(name, 1), zoo.captured(name)
    block, module = MODULES.get(name, ("model.layers.0", "model.layers.0.self_attn"))
    assert [(c.block_name, c.name, c.layer_index) for c in captures] == [(block, module, 0)]
    (one,) = captures
    assert one.module is model.get_submodule(module)
    assert len(nodes(one.graph, KV_UPDATE)) == 1
    assert len(nodes(one.graph, ATTENTION)) == (0 if name in zoo.INLINE else 1)
    assert one.key_shape[-1] == one.value_shape[-1] == 32


@pytest.mark.parametrize("name", TRACED)
def test_placeholders_are_the_inputs_and_read_nothing_but_parameters(name):
    (one,) = zoo.captured(name)
    placeholders = one.graph.find_nodes(op="placeholder")
    assert [n.name for n in placeholders] == [i.name for i in one.inputs]
    own = dict(one.module.named_parameters()) | dict(one.module.named_buffers())
    constants = {f"rotatekv.{constant}" for constant in one.constants}
    assert {str(n.target) for n in one.graph.find_nodes(op="get_attr")} <= set(own) | constants
    hidden = next(i for i in one.inputs if i.example.is_floating_point())
    assert hidden.example.shape[-1] == 128


@pytest.mark.parametrize(
    ("name", "static", "extra"),
    [
        ("llama", {"scaling": 32**-0.5}, ()),
        ("gemma2", {"softcap": 50.0, "sliding_window": zoo.WINDOW}, ()),
        ("gpt_oss", {"sliding_window": zoo.WINDOW}, ("s_aux",)),
        ("falcon", {"scaling": 32**-0.5}, ()),
    ],
)
def test_arguments_of_the_attention_are_kept(name, static, extra):
    (one,) = zoo.captured(name)
    assert one.arguments.static.items() >= static.items()
    assert one.arguments.extra_names == extra
    assert len(nodes(one.graph, ATTENTION)[0].args[4]) == len(extra)


def test_layers_are_captured_in_order():
    captures = capture(zoo.build("mistral"))
    assert [c.layer_index for c in captures] == [0, 1]
    assert [c.name for c in captures] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert [c.block_name for c in captures] == [f"model.layers.{i}" for i in range(2)]


def state_of(model):
    """All that a capture could leave behind."""
    return {
        name: (
            set(vars(module)),
            [len(h) for h in (module._forward_hooks, module._forward_pre_hooks, module._buffers)],
            module.training,
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ["llama", "falcon"])  # falcon is traced twice
def test_the_model_is_left_as_it_was(name):
    model, done = zoo.build(name, layers=1), []
    before, config = state_of(model), copy.deepcopy(model.config)
    weights = copy.deepcopy(model.state_dict())
    ids, mask = zoo.prompt()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        capture(model, progress=lambda *step: done.append(step))
        assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    assert done == [(1, 1)]
    assert state_of(model) == before
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation == "sdpa"
    assert all(torch.equal(w, model.state_dict()[k]) for k, w in weights.items())


def test_the_own_attention_implementation_comes_back():
    model = zoo.build("llama", layers=1)
    model.set_attn_implementation("eager")
    (one,) = capture(model)
    assert model.config._attn_implementation == "eager"
    assert len(nodes(one.graph, ATTENTION)) == 1


class Untraceable(LlamaAttention):
    """Depends on the numbers it sees."""

    def forward(self, hidden_states, **kwargs):
        if hidden_states.sum().item() == 0.25:
            hidden_states = hidden_states + 1
        return super().forward(hidden_states, **kwargs)


def test_a_module_that_cannot_be_traced_is_reported():
    model = zoo.build("llama")
    model.model.layers[1].self_attn.__class__ = Untraceable
    first, second = capture(model)
    assert isinstance(first, Capture)
    assert isinstance(second, CaptureFailure)
    assert (second.name, second.layer_index) == ("model.layers.1.self_attn", 1)
    assert second.reason.startswith("export failed: ")
    assert "\n" not in second.reason
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=64, **sizes))


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0))


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoModel.from_config(AutoConfig.for_model("vit", image_size=8, patch_size=4, **sizes))


def mamba():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "vocab_size": 64}
    return AutoModel.from_config(AutoConfig.for_model("mamba", **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "BertForMaskedLM"),
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (mamba, "No module of MambaModel wrote to the KV cache"),
        (vit, "ViTModel"),
    ],
)
def test_models_that_are_no_decoders_are_refused(make, message):
    model = make().eval()
    with pytest.raises(InputError, match=message):
        capture(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_that_fails_on_the_dummy_batch_is_refused():
    model = zoo.build("llama", layers=1)
    model.model.norm.forward = lambda hidden: 1 / 0
    with pytest.raises(InputError, match="ZeroDivisionError"):
        capture(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_lookup_finds_what_a_path_leads_to():
    args, kwargs = (10, (11, 12)), {"a": 1, "b": {"c": 2}}
    assert lookup(args, kwargs, (0, 0)) == 10
    assert lookup(args, kwargs, (0, 1, 1)) == 12
    assert lookup(args, kwargs, (1, "a")) == 1
    assert lookup(args, kwargs, (1, "b", "c")) == 2


def test_lookup_of_what_a_call_leaves_out_is_none():
    for path in ((0, 5), (1, "missing"), (1, "missing", 0), (0, 1, 9)):
        assert lookup((1, (2,)), {}, path) is None
