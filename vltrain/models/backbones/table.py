"""The families that a recipe's LLM and ViT may be of: a new one is a file beside this and a line here."""

from __future__ import annotations

from transformers import PreTrainedConfig

from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.decoders import GEMMA, GEMMA2, GEMMA3, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3
from vltrain.models.backbones.dino import DINOV2, DINOV2_WITH_REGISTERS, DINOV3
from vltrain.models.backbones.family import Language, Tower
from vltrain.models.backbones.llama import LLAMA
from vltrain.models.backbones.siglip import SIGLIP, SIGLIP2

LANGUAGES: dict[str, Language] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
TOWERS: dict[str, Tower] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "siglip2": SIGLIP2,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "dinov3": DINOV3,
}


def language_of(config: PreTrainedConfig) -> Language:
    """The family of an LLM of that config."""
    return next(one for one in LANGUAGES.values() if isinstance(config, one.config))


def tower_of(config: PreTrainedConfig) -> Tower:
    """The family of a vision tower of that config."""
    return next(one for one in TOWERS.values() if isinstance(config, one.config))
