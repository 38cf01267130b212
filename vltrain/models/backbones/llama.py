"""LLaMA and what has its config: Vicuna, TinyLlama, SmolLM2, Llama 3.x."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from vltrain.models.backbones.family import Language, Layout, Network
from vltrain.models.pretrained.meta_llama import MetaWeights, is_meta_folder, meta_llama_config


def llama_sizes(
    width: int, ffn: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, *aliases: str, **more: Any
) -> Network:
    """A published network in the words of a LLaMA's config, and those of `more`."""
    sizes = {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, **more,
    }  # fmt: skip
    return Network(sizes, aliases)


LLMS: dict[str, Network] = {
    "llama-7b": llama_sizes(4096, 11008, 32, 32, 32, 32000, "llama7b", "llama17b", "vicuna7b"),
    "llama-13b": llama_sizes(5120, 13824, 40, 40, 40, 32000, "llama13b", "llama113b", "vicuna13b"),
    "llama-30b": llama_sizes(6656, 17920, 60, 52, 52, 32000, "llama30b", "llama33b"),
    "llama-65b": llama_sizes(8192, 22016, 80, 64, 64, 32000, "llama65b"),
    "llama-2-7b": llama_sizes(4096, 11008, 32, 32, 32, 32000, "llama27b"),
    "llama-2-13b": llama_sizes(5120, 13824, 40, 40, 40, 32000, "llama213b"),
    "llama-2-70b": llama_sizes(8192, 28672, 80, 64, 8, 32000, "llama270b"),
    "llama-3-8b": llama_sizes(4096, 14336, 32, 32, 8, 128256, "llama38b", "llama318b"),
    "llama-3.2-1b": llama_sizes(2048, 8192, 16, 32, 8, 128256, "llama321b", tie_word_embeddings=True),
    "llama-3.2-3b": llama_sizes(3072, 8192, 28, 24, 8, 128256, "llama323b", tie_word_embeddings=True, head_dim=128),
    "tinyllama-1.1b": llama_sizes(2048, 5632, 22, 32, 4, 32000, "tinyllama"),
    "smollm2-135m": llama_sizes(576, 1536, 30, 9, 3, 49152, "smollm2135m", "llmsmollm2", tie_word_embeddings=True),
    "smollm2-360m": llama_sizes(960, 2560, 32, 15, 5, 49152, "smollm2360m", tie_word_embeddings=True),
    "smollm2-1.7b": llama_sizes(2048, 8192, 24, 32, 32, 49152, "smollm217b", tie_word_embeddings=True),
}


def _meta_config(key: str, path: Path, kind: str | None) -> LlamaConfig:
    return meta_llama_config(key, path)


LLAMA = Language(
    title="LLaMA",
    model_types=("llama",),
    config=LlamaConfig,
    network=LlamaForCausalLM,
    published=LLMS,
    layouts=(Layout(is_it=is_meta_folder, config=_meta_config, weights=MetaWeights),),
    norms={"attention": "input_layernorm", "ffn": "post_attention_layernorm"},
    readers={
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "ffn": ("mlp.gate_proj", "mlp.up_proj"),
    },
    writers={"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"},
    bias_switches={"attention": ("attention_bias",), "ffn": ("mlp_bias",)},
    blip_targets={
        "attn": ("self_attn.q_proj", "self_attn.v_proj"),
        "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    prompts=True,
    liger=True,
)
