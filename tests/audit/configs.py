"""Configs of published models' kinds, as their config.json says them where transformers' defaults do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
INTERLEAVED = {
    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
}  # fmt: skip
PARTIAL = {**INTERLEAVED, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
MAMBA_MIX = [*["linear_attention"] * 3, "full_attention"] * 8

LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }},
    "mistral": {"sliding_window": 4096}, "gemma2": {}, "gemma3_text": {}, "gpt_oss": {}, "cohere2": {}, "granite": {
        "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
        "residual_multiplier": 0.22,
    },
    "qwen2": {}, "qwen3": {}, "qwen3_moe": {}, "gemma": {}, "phi3": {}, "olmo2": {}, "olmo3": {}, "smollm3": {},
    "starcoder2": {}, "glm4": {}, "exaone4": {}, "gemma4_text": {}, "deepseek_v3": {}, "gpt_neox": {},
    "qwen3_next": {}, "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}, "falcon_h1": {},
    "bamba": {"attn_layer_indices": [9, 18, 27]}, "granitemoehybrid": {"layer_types": MAMBA_MIX},
    "seed_oss": {}, "ministral3": {},
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "llava": {}, "llava_next": {}, "llava_onevision": {}, "smolvlm": {}, "idefics3": {}, "internvl": {},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen3_vl": {"text_config": {"rope_parameters": INTERLEAVED}},
    "gemma3": {}, "paligemma": {},
    "qwen3_5": {"text_config": {"rope_parameters": PARTIAL}},
    "aya_vision": {}, "mistral3": {}, "idefics2": {}, "ovis2": {}, "video_llama_3": {},
    "glm4v": {"text_config": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12],
    }}},
}  # fmt: skip


def config_of(kind: str, settings: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Of a model type, large as published ones are."""
    known = {**LANGUAGE, **VISION}[kind] if settings is None else settings
    return CONFIG_MAPPING[kind](**known)
