"""Tiny models with random weights of every family in the support matrix (``docs/models.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.models.built_in import MAX_POSITIONS, PAD, SPECIAL_TOKENS, TURN_END, TURN_START, make_tiny_tokenizer

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR_ATTENTION = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
STATE_SPACE = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
WINDOW = {"sliding_window": 8}
MIXED_WINDOWS = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "mistral": {**DECODER, **WINDOW},
    "ministral": {**DECODER, **MIXED_WINDOWS},
    "qwen2": DECODER,
    "qwen3": DECODER,
    "qwen3_5_text": {**DECODER, **LINEAR_ATTENTION},
    "gemma2": {**DECODER, **MIXED_WINDOWS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**DECODER, **MIXED_WINDOWS, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        **DECODER,
        **MIXED_WINDOWS,
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "phi3": DECODER,
    "smollm3": DECODER,
    "olmo2": DECODER,
    "olmo3": {**DECODER, **MIXED_WINDOWS},
    "granite": {**DECODER, "logits_scaling": 4.0},
    "granitemoehybrid": {
        **DECODER,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "shared_intermediate_size": 64,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
    },
    "granitemoe": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": {**DECODER, **MIXED_WINDOWS},
    "glm4": DECODER,
    "exaone4": {**DECODER, **MIXED_WINDOWS},
    "gpt_oss": {**DECODER, **MIXED_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**DECODER, **EXPERTS},
    "qwen3_next": {**DECODER, **EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 32},
    "mixtral": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**DECODER, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **DECODER,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "lfm2": {**DECODER, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {**DECODER, **STATE_SPACE},
    "bamba": {
        **DECODER,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "attn_layer_indices": [1],
    },
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
    },
    "nemotron": DECODER,
    "starcoder2": DECODER,
    "stablelm": DECODER,
    "arcee": DECODER,
    "ernie4_5": DECODER,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": MAX_POSITIONS,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_neox": DECODER,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "dropout": 0.0,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "phi": {**DECODER, "num_key_value_heads": 2},
    "gemma": DECODER,
    "ministral3": DECODER,
    "cohere": DECODER,
    "olmo": DECODER,
    "apertus": DECODER,
    "seed_oss": {**DECODER, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "hunyuan_v1_dense": DECODER,
    "helium": DECODER,
    "qwen2_moe": {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 32},
    "glm4_moe": {
        **DECODER,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "hunyuan_v1_moe": {**DECODER, "num_experts": 4, "moe_topk": 2},
    "ernie4_5_moe": {**DECODER, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "lfm2_moe": {**DECODER, **EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        **DECODER,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
}
"""Type of model -> the fields of its config that make it tiny."""

VARIANTS: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": MAX_POSITIONS},
    "vaultgemma": {**DECODER, **MIXED_WINDOWS, "query_pre_attn_scalar": 16},
    "granitemoeshared": {
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "qwen3_5_moe_text": {**DECODER, **EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 32},
    "olmo_hybrid": {**DECODER, **LINEAR_ATTENTION},
}
"""Relatives of these families that are not in the matrix."""


def family_config(model_type: str, changes: Mapping[str, Any] | None = None) -> Any:
    """Return the config of a tiny model, with some fields changed."""
    tokens = {
        "vocab_size": 260,
        "bos_token_id": SPECIAL_TOKENS.index(TURN_START),
        "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    fields = {
        "max_position_embeddings": MAX_POSITIONS,
        **(FAMILIES | VARIANTS)[model_type],
        **tokens,
        **(changes or {}),
    }
    return AutoConfig.for_model(model_type, **fields)


def family_model(model_type: str, seed: int = 0, changes: Mapping[str, Any] | None = None) -> Any:
    """Return a tiny model in float32 with random weights, with some fields of its config changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(family_config(model_type, changes), dtype=torch.float32)


def write_family(model_type: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a tiny model with the tiny tokenizer, with some fields of its config changed."""
    model = family_model(model_type, changes=changes)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder
