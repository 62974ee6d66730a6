"""Decoders of many architectures, small enough to trace in a second, with random weights that matter."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import fx
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gptj import modeling_gptj

import rotatekv_fx as rk
from rotatekv_fx.capture import capture
from rotatekv_fx.collect import collect
from rotatekv_fx.passes.normalize import normalize
from rotatekv_fx.sites import find_sites

VOCABULARY = 256
WINDOW = 8  # of every sliding layer; prompts of the tests are longer

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZE = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 512}
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {**_IDS, **_SIZE, **_HEADS, "tie_word_embeddings": False}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_OLD_STYLE = {**_IDS, "n_positions": 512, "n_embd": 128, "n_head": 4, "rotary_dim": 16}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

# architecture -> (model type of its config, what differs from a small llama)
_ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama_dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "mixtral": ("mixtral", {**_EXPERTS, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "gemma3_text": ("gemma3_text", {**_ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "phi3": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 16,
                "long_factor": [1.0 + 0.5 * i for i in range(16)],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None, "rotary_pct": 0.25}),
    "falcon": ("falcon", {"alibi": False, "multi_query": True, "new_decoder_architecture": False}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "glm": ("glm", {"head_dim": 32}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_EXPERTS,
            **_ALTERNATING,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1.5e5,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gptj": ("gptj", None),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
NAMES = tuple(_ARCHITECTURES)

# The architectures that must reproduce the untransformed model's tokens.
DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "falcon",
    "olmo2",
    "cohere",
    "glm",
    "gpt_oss",
    "mixtral",
)


# Computed inline by the module itself; transformers 5.24 lets gptj use the attention interface.
INLINE = () if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS") else ("gptj",)


def build(name, layers=2, dtype=torch.float32, seed=0, **overrides):
    """A model in eval mode with random weights of its own, large enough that its greedy tokens vary.

    Args:
        name: one of NAMES.
        layers: how many.
        dtype: of its parameters.
        seed: of its weights.
        overrides: fields of its config.
    """
    model_type, differences = _ARCHITECTURES[name]
    if differences is None:
        fields = {**_OLD_STYLE, "n_layer": layers}
    else:
        fields = {**_PLAIN, "num_hidden_layers": layers, **differences}
    fields = {k: v for k, v in {**fields, **overrides}.items() if v is not None}
    fields |= {k: fields[k][:layers] for k in ("layer_types", "no_rope_layers") if k in fields}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    _liven(model, torch.Generator().manual_seed(seed + 1))
    if name == "gemma2":
        model.set_attn_implementation("eager")  # transformers' SDPA knows no soft-cap; 5.17 drops it
    model.generation_config.eos_token_id = None  # every sequence runs to its full length
    return model.to(dtype).eval()


@torch.no_grad()
def _liven(model, generator):
    """Replace initial weights, near zero or all alike, by ones that make every part of the model count."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(
                noise * (0.2 if "embed" in name or "wte" in name else 1.5 * parameter.shape[-1] ** -0.5)
            )
        else:
            parameter.add_(noise, alpha=0.1)  # norm weights, biases, sink logits


def prompt(batch=3, length=14, padding=(0, 4, 9), seed=0):
    """Token ids [B, S] and a mask with `padding` tokens on the left of each sequence."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding[:batch]):
        mask[row, :pad] = 0
    return ids * mask, mask


def positions_of(mask):
    """Position ids [B, S] that count from the first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def windows(count=3, length=64, seed=5):
    """Token ids to calibrate on."""
    return list(torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)))


def quiet(done, total):
    """A progress function that shows nothing."""


def calibrated(model):
    """The calibration of an untransformed model on `windows`."""
    return rk.calibrate(model, windows(), progress=quiet)


def transformed(model, recipe="paper", calibration=None, **settings):
    """A transformed copy."""
    return rk.transform(copy.deepcopy(model), rk.RotateKVConfig(recipe=recipe, **settings), calibration)


# Tracing a model costs a second or two, so tests share models. What these return must not be changed.


@functools.cache
def shared(name, layers=2):
    """The untransformed model."""
    return build(name, layers)


@functools.cache
def captured(name, layers=1):
    """Its normalised captures."""
    captures = capture(shared(name, layers))
    for one in captures:
        normalize(one)
    return captures


@functools.cache
def shared_calibration(name, layers=2):
    """Its calibration on `windows`, as `calibrated` gives it."""
    sites, _ = find_sites(captured(name, layers))
    return collect(shared(name, layers), sites, windows(), progress=quiet)


@functools.cache
def packed(name, recipe="paper", layers=2, **settings):
    """A transformed copy of it."""
    calibration = None if recipe == "none" else shared_calibration(name, layers)
    return transformed(shared(name, layers), recipe, calibration, **settings)


def fresh_site(name):
    """The site of a model of one layer, with a graph of its own that passes may rewrite."""
    (one,) = captured(name)
    graph = fx.Graph()
    graph.output(graph.graph_copy(one.graph, {}))
    (site,), rejections = find_sites([dataclasses.replace(one, graph=graph)])
    assert rejections == []
    return site


def relative(found, expected):
    """Relative RMS error."""
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For test modules that import it: these models are too small for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
