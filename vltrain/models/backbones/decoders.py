"""Decoders built much like LLaMA: Qwen2 and 2.5, Qwen3, Mistral, SmolLM3, Phi-3 and Phi-4, OLMo 2, Gemma 1 to 3."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from vltrain.models.backbones.family import Language, Network
from vltrain.models.backbones.llama import LLAMA, llama_sizes


def _tied(*sizes: int | str, **more: Any) -> Network:
    return llama_sizes(*sizes, tie_word_embeddings=True, **more)  # pyright: ignore[reportArgumentType]


_QWEN3 = {"head_dim": 128}  # whatever the width

QWEN2 = Language(
    title="Qwen2",
    model_types=("qwen2",),
    config=Qwen2Config,
    network=Qwen2ForCausalLM,
    published={
        "qwen2.5-0.5b": _tied(896, 4864, 24, 14, 2, 151936, "qwen2505b", "qwen205b"),
        "qwen2.5-1.5b": _tied(1536, 8960, 28, 12, 2, 151936, "qwen2515b", "qwen215b"),
        "qwen2.5-3b": _tied(2048, 11008, 36, 16, 2, 151936, "qwen253b"),
        "qwen2.5-7b": llama_sizes(3584, 18944, 28, 28, 4, 152064, "qwen257b", "qwen27b"),
    },
    norms=LLAMA.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
)
QWEN3 = Language(
    title="Qwen3",
    model_types=("qwen3",),
    config=Qwen3Config,
    network=Qwen3ForCausalLM,
    published={
        "qwen3-0.6b": _tied(1024, 3072, 28, 16, 8, 151936, "qwen306b", **_QWEN3),
        "qwen3-1.7b": _tied(2048, 6144, 28, 16, 8, 151936, "qwen317b", **_QWEN3),
        "qwen3-4b": _tied(2560, 9728, 36, 32, 8, 151936, "qwen34b", **_QWEN3),
        "qwen3-8b": llama_sizes(4096, 12288, 36, 32, 8, 151936, "qwen38b", **_QWEN3),
    },
    norms=LLAMA.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    bias_switches={"attention": ("attention_bias",)},
)
MISTRAL = Language(
    title="Mistral",
    model_types=("mistral",),
    config=MistralConfig,
    network=MistralForCausalLM,
    published={
        "mistral-7b": llama_sizes(4096, 14336, 32, 32, 8, 32768, "mistral7b", sliding_window=None),
        "mistral-7b-v0.1": llama_sizes(4096, 14336, 32, 32, 8, 32000, "mistral7bv01", sliding_window=4096),
    },
    norms=LLAMA.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
)
SMOLLM3 = Language(
    title="SmolLM3",
    model_types=("smollm3",),
    config=SmolLM3Config,
    network=SmolLM3ForCausalLM,
    published={"smollm3-3b": _tied(2048, 11008, 36, 16, 4, 128256, "smollm33b")},
    norms=LLAMA.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    bias_switches=LLAMA.bias_switches,
)
PHI3 = Language(
    title="Phi-3",
    model_types=("phi3",),
    config=Phi3Config,
    network=Phi3ForCausalLM,
    published={
        "phi-3-mini": llama_sizes(3072, 8192, 32, 32, 32, 32064, "phi3mini"),
        "phi-4": llama_sizes(5120, 17920, 40, 40, 10, 100352),
    },
    norms=LLAMA.norms,
    readers={"attention": ("self_attn.qkv_proj",), "ffn": ("mlp.gate_up_proj",)},
    writers=LLAMA.writers,
)
OLMO2 = Language(
    title="OLMo 2",
    model_types=("olmo2",),
    config=Olmo2Config,
    network=Olmo2ForCausalLM,
    published={
        "olmo-2-1b": llama_sizes(2048, 8192, 16, 16, 16, 100352, "olmo21b", "olmo204251b"),
        "olmo-2-7b": llama_sizes(4096, 11008, 32, 32, 32, 100352, "olmo27b", "olmo211247b"),
    },
    norms={},  # they stand behind the sublayers
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    bias_switches={"attention": ("attention_bias",)},
)
GEMMA = Language(
    title="Gemma",
    model_types=("gemma",),
    config=GemmaConfig,
    network=GemmaForCausalLM,
    published={
        "gemma-2b": _tied(2048, 16384, 18, 8, 1, 256000, "gemma2b", head_dim=256),
        "gemma-7b": _tied(3072, 24576, 28, 16, 16, 256000, "gemma7b", head_dim=256),
    },
    norms=LLAMA.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    bias_switches={"attention": ("attention_bias",)},
)
GEMMA2 = Language(
    title="Gemma 2",
    model_types=("gemma2",),
    config=Gemma2Config,
    network=Gemma2ForCausalLM,
    published={
        "gemma-2-2b": _tied(2304, 9216, 26, 8, 4, 256000, "gemma22b", head_dim=256),
        "gemma-2-9b": _tied(3584, 14336, 42, 16, 8, 256000, "gemma29b", head_dim=256),
    },
    norms={"attention": "input_layernorm", "ffn": "pre_feedforward_layernorm"},
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    bias_switches={"attention": ("attention_bias",)},
)
GEMMA3 = Language(
    title="Gemma 3",
    model_types=("gemma3_text",),
    config=Gemma3TextConfig,
    network=Gemma3ForCausalLM,
    published={"gemma-3-1b": _tied(1152, 6912, 26, 4, 1, 262144, "gemma31b", head_dim=256, sliding_window=512)},
    norms=GEMMA2.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    bias_switches={"attention": ("attention_bias",)},
)
