"""A tiny model of every architecture that `AutoModelForCausalLM` can build, made from its config's fields.

A field keeps its default unless it is a size: sizes are replaced by name, lists with one entry a layer by
their distinct entries. What that does not reach stands in `ADJUSTMENTS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
HIDDEN = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
SLIDING = 8  # tokens that a sliding layer sees
POSITIONS = 128
ORIGINAL_POSITIONS = 16  # of scaled RoPE, so that the scaling is at work
LAYERS = 2
MOST_LAYERS = 6  # an architecture with more kinds of layers than that shows the first ones
MOST_PARAMETERS = 4_000_000

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers"
)
_SIZES: tuple[tuple[int, str], ...] = (
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size output_vocab_size",
    ),
    (
        HIDDEN,
        "hidden_size d_model n_embd embedding_dim emb_dim embedding_size input_embedding_size "
        "lru_width output_embedding_size word_embed_proj_dim attention_hidden_size "
        "cross_attention_hidden_size ple_embed_dim embed_dim shape_embed_dim pronunciation_embed_dim",
    ),
    (
        96,
        "intermediate_size ffn_dim d_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size "
        "n_inner feed_forward_size dense_intermediate_size prefix_dense_intermediate_size "
        "intermediate_size_mlp",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
        "router_hidden_size q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input "
        "moe_latent_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts "
        "swa_num_attention_heads n_mamba_heads linear_num_heads linear_num_key_heads "
        "linear_num_value_heads num_local_experts n_routed_experts moe_num_experts",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k index_n_heads "
        "num_global_key_value_heads top_k_experts num_blocks",
    ),
    (
        HEAD_DIM,
        "head_dim dim_head d_head attention_head_dim attention_head_size kv_channels swa_head_dim "
        "v_head_dim qk_nope_head_dim index_head_dim global_head_dim linear_head_dim "
        "linear_key_head_dim laurel_rank linear_value_head_dim mamba_d_state ssm_state_size "
        "state_size adapter_rank mamba_dt_rank hc_lowrank mamba_d_head mamba_head_dim mamba_headdim "
        "indexer_head_dim",
    ),
    (
        8,
        "qk_rope_head_dim time_step_rank chunk_size mamba_chunk_size rotary_dim block_size "
        "loop_gate_rank gated_norm_rank mamba_n_heads mamba_num_heads",
    ),
    (
        SLIDING,
        "sliding_window sliding_window_size window_size attention_window_size local_attention "
        "attention_chunk_size",
    ),
    (
        POSITIONS,
        "keep_window_size max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len "
        "context_length",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group "
        "num_expert_group first_k_dense_replace num_dense_layers mamba_n_groups n_groups "
        "mamba_ngroups",
    ),
    (LAYERS, _LAYER_COUNTS),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}

_OFTEN_NONE = (
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
)
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_BYTES = {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]}
# What the rule does not reach: fields of single architectures, nested where the config is.
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "blt": _BYTES,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_AND_FULL * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots3_note_text": {
        "per_layer_config": {
            "2": {"head_dim": 24, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
        }
    },
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_AND_FULL * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "granitemoehybrid": _HYBRID,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"floor_scale": 4},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "nemotron_h": {"mamba_num_heads": 8},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "sarvam_mla": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
        "num_key_value_heads": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}
ADJUSTMENTS["qwen4_exp_text"] = ADJUSTMENTS["qwen4_exp"]["text_config"]
ADJUSTMENTS["llama4"] = {"text_config": ADJUSTMENTS["llama4_text"]}
ADJUSTMENTS["dots3_note"] = {"text_config": ADJUSTMENTS["dots3_note_text"]}
ADJUSTMENTS["gemma3n"] = {"text_config": ADJUSTMENTS["gemma3n_text"]}


def architectures() -> tuple[str, ...]:
    """Model types that `AutoModelForCausalLM` knows, in its order."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of that architecture with every size made small.

    Raises:
        Exception: of whatever kind the config class raises on what the rule makes of it.
    """
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind(), ADJUSTMENTS.get(model_type, {})))


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode, fp32, with random weights that make every part count and greedy tokens vary.

    Raises:
        ValueError: it would be large: a size that the rule does not know.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters; name its sizes in SIZES or ADJUSTMENTS")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    _liven(model, torch.Generator().manual_seed(seed + 1))
    for name in ("eos_token_id", "forced_eos_token_id"):
        setattr(model.generation_config, name, None)  # every sequence runs to its full length
    model.generation_config.pad_token_id = 0
    return model


def _shrunk(default: PreTrainedConfig, adjustments: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that differ from its default."""
    own = default.to_dict()
    fields = {name: SIZES[name] for name, value in own.items() if name in SIZES and _is_size(value)}
    fields |= {name: i for name, i in _IDS.items() if name in own}
    fields |= {name: True for name in ("is_decoder",) if name in own}
    fields |= {name: SIZES[name] for name in _OFTEN_NONE if own.get(name, 0) is None}
    if "kv_lora_rank" in own:  # a latent is shared by all heads
        fields["num_key_value_heads"] = HEADS
        if own.get("head_dim") == own.get("qk_rope_head_dim"):
            fields["head_dim"] = SIZES["qk_rope_head_dim"]
    fields |= _layer_lists(default, own)
    if isinstance(own.get("rope_parameters"), dict):
        fields["rope_parameters"] = _short_rope(own["rope_parameters"])
    if own.get("original_max_position_embeddings"):
        fields["original_max_position_embeddings"] = ORIGINAL_POSITIONS
    for name in type(default).sub_configs:
        nested, further = getattr(default, name, None), adjustments.get(name, {})
        if isinstance(nested, PreTrainedConfig):
            fields[name] = {"model_type": nested.model_type, **_shrunk(nested, further)}
    return fields | {k: v for k, v in adjustments.items() if k not in type(default).sub_configs}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _layer_lists(default: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer, cut to the first layer of each kind, and the number of those layers."""
    count_name = next((n for n in _LAYER_COUNTS.split() if n in own), None)
    count = own.get(count_name)
    lists = {n: v for n, v in own.items() if isinstance(v, list | tuple) and len(v) == count and count > 2}
    if not lists:
        return {}
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(str([v[layer] for v in lists.values()]), layer)
    chosen = sorted(kinds.values())[:MOST_LAYERS]
    chosen += range(chosen[-1] + 1, chosen[-1] + 1 + LAYERS - len(chosen))
    fields: dict[str, Any] = {n: [SIZES.get(n, v[i]) for i in chosen] for n, v in lists.items()}
    if "per_layer_config" in own:
        special = {int(i): v for i, v in own["per_layer_config"].items()}
        fields["per_layer_config"] = {
            f"{new:02d}": {n: 2 * SIZES[n] for n in special[old]}
            for new, old in enumerate(chosen)
            if old in special
        }
    return {**fields, count_name: len(chosen)}


def _short_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters, of each layer type where they differ, scaled from a short context."""
    if any(isinstance(v, dict) for v in parameters.values()):
        return {n: v and _short_rope(v) for n, v in parameters.items()}
    scaled = "original_max_position_embeddings" in parameters
    return parameters | ({"original_max_position_embeddings": ORIGINAL_POSITIONS} if scaled else {})


@torch.no_grad()
def _liven(model: nn.Module, generator: torch.Generator) -> None:
    """Replace initial weights, near zero or all alike."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            embeds = any(part in name for part in ("embed", "wte", "wpe"))
            parameter.copy_(noise * (0.2 if embeds else 1.5 * parameter.shape[-1] ** -0.5))
        else:
            parameter.add_(noise, alpha=0.1)  # norm weights, biases, sink logits
