"""The families that a recipe's LLM and ViT may be of: a new one is a file beside this and a line here."""

from __future__ import annotations

from transformers import PreTrainedConfig

from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.family import Language, Tower
from vltrain.models.backbones.llama import LLAMA

LANGUAGES: dict[str, Language] = {
    "llama": LLAMA,
}
TOWERS: dict[str, Tower] = {
    "clip": CLIP,
}


def language_of(config: PreTrainedConfig) -> Language:
    """The family of an LLM of that config."""
    return next(one for one in LANGUAGES.values() if isinstance(config, one.config))


def tower_of(config: PreTrainedConfig) -> Tower:
    """The family of a vision tower of that config."""
    return next(one for one in TOWERS.values() if isinstance(config, one.config))
