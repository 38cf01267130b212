"""Sections of recipes, as large as published models, and the subjects of their audit."""

from __future__ import annotations

from typing import Any

from tests.audit.configs import config_of
from vltrain.audit.recipe import question_of, ways_of
from vltrain.audit.subject import Subject
from vltrain.audit.subjects.table import subject_of
from vltrain.config.model.instructblip import BlipModelConfig, InstructBlipConfig, LanguageTuning, QFormerTuning
from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, VisionConfig
from vltrain.models.instructblip.sizes import BLIPS

CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14}  # fmt: skip
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def mmt(*, vision: dict[str, Any] | None = None, llm: dict[str, Any] | None = None, adapter: Any = None, **more: Any):
    """Of LLaMA-7B and CLIP unless something else is said."""
    return MmtConfig(
        vision=VisionConfig(**{"config": CLIP, **(vision or {})}),
        llm=LLMConfig(**{"config": LLAMA, "tokenizer": "none", **(llm or {})}),
        adapter=AdapterConfig(**(adapter or {})),
        **more,
    )


def blip(size: str = "instructblip-vicuna-7b", **tuned: Any) -> BlipModelConfig:
    """One that is published."""
    section = InstructBlipConfig(config=BLIPS[size].config, tokenizer="none", qformer_tokenizer="none", **tuned)
    return BlipModelConfig(instructblip=section)


def both(kind: str) -> dict[str, Any]:
    """Updates of one kind in Q-Former and LLM."""
    return {"qformer": QFormerTuning(mode=kind), "llm": LanguageTuning(mode=kind)}


def subject(section: Any) -> Subject:
    """Of a recipe's section, shrunken as its audit does it."""
    question = question_of(section)
    assert question is not None
    (way,) = question.ways.values()
    return subject_of(way)


def family(kind: str, way: str = "all weights", settings: dict[str, Any] | None = None) -> Subject:
    """Of a model without a recipe."""
    return subject_of(ways_of(kind, config_of(kind, settings))[way], way)
