"""Decoders of transformers' families in miniature: each with every mechanism that it is known for, so that a packed row
goes through it. Windows and chunks are shorter than the segments."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 300
BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
WINDOW = {"sliding_window": 6}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "mixtral": {**WINDOW, **LOCAL_EXPERTS},
    "ministral3": {},
    "qwen2": {**WINDOW, **BOTH, "use_sliding_window": True},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "gemma": {},
    "gemma2": {**WINDOW, **BOTH, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOW, **BOTH, "final_logit_softcapping": 3.0},
    "gemma4_text": {**WINDOW, **BOTH, **PER_LAYER},
    "vaultgemma": {**WINDOW, **BOTH, "attn_logit_softcapping": 2.0},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": LOCAL_EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": {**WINDOW, **BOTH},
    "olmoe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**WINDOW, **BOTH, "logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "granitemoe": {**LOCAL_EXPERTS, "logits_scaling": 4.0},
    "exaone4": {**WINDOW, **BOTH},
    "gpt_oss": {**WINDOW, **BOTH, **LOCAL_EXPERTS},
    "llama4_text": {
        **LOCAL_EXPERTS, "attention_chunk_size": 6, "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    },
    "starcoder2": WINDOW,
    "glm4": {},
    "glm4_moe": ROUTED,
    "deepseek_v3": {**ROUTED, **LATENT},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "stablelm": {},
    "nemotron": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "nanochat": {},
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.3,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **MAMBA, **LOCAL_EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32,
        "logits_scaling": 4.0,
    },
    "jamba": {
        **EXPERTS, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "attention"]},
    "minimax": {**LOCAL_EXPERTS, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


def tiny_decoder(name: str) -> Any:
    """A network with a head of that family, in evaluation mode, its weights far from any special value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](**{**BASE, **FAMILIES[name]})
        config._experts_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def decoder_of(model: Any) -> Any:
    """What is in front of the head."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder
