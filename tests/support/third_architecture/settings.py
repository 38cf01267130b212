"""What a recipe may say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vltrain.config.model.base import ModelConfig, TokenizerPlaces


@dataclass(kw_only=True)
class ProjectorSection:
    """A random ViT and a random LLaMA, and one matrix between them."""

    vision: dict[str, Any] = field(default_factory=dict)
    """Keys of transformers' CLIPVisionConfig."""
    llm: dict[str, Any] = field(default_factory=dict)
    """Keys of transformers' LlamaConfig."""
    tokenizer: str = "asset://tiny_llama"
    """Where the tokenizer is."""


@dataclass(kw_only=True)
class ProjectorConfig(ModelConfig):
    """An image is the mean of its patches; a matrix makes it one token."""

    FOLDER: ClassVar = "tests.support.third_architecture"
    PATHS: ClassVar = ("projector.tokenizer",)
    FROZEN: ClassVar = ("projector.vision", "projector.llm")

    architecture: str = "projector"
    projector: ProjectorSection = field(default_factory=ProjectorSection)

    def trains(self, network: str) -> bool:
        return False

    @property
    def tokenizers(self) -> TokenizerPlaces:
        return TokenizerPlaces(key="model.projector.tokenizer", source=self.projector.tokenizer)

    @property
    def bases(self) -> dict[str, str | None]:
        return {"ViT": None, "LLM": None}
