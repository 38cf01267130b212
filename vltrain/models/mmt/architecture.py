"""Multimodal Model Tuning as the other rooms see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vltrain.config.model.mmt import MmtConfig
from vltrain.models.adapters import is_routed
from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.family import Family, Network
from vltrain.models.backbones.table import LANGUAGES, TOWERS
from vltrain.models.interface import Architecture, PublishedSizes
from vltrain.models.mmt.build import build_mmt, check_sources, weight_files
from vltrain.models.pretrained.clip_state import ACTIVATIONS
from vltrain.models.pretrained.readers import language_config


def _published(families: Mapping[str, Family]) -> dict[str, Network]:
    """The sizes of all families by name; those of other families than the first say which they are of."""
    found: dict[str, Network] = {}
    for number, family in enumerate(families.values()):
        named = {"model_type": family.model_types[0]} if number else {}
        found |= {name: replace(one, config={**named, **one.config}) for name, one in family.published.items()}
    return found


def _assume_vision(model: MmtConfig, name: str) -> MmtConfig:
    config = _published(TOWERS)[name].config
    if name in CLIP.published:
        config = {**config, "hidden_act": ACTIVATIONS[model.vision.kind or "clip"]}
    return replace(model, vision=replace(model.vision, source=None, kind=None, config=config))


def _assume_llm(model: MmtConfig, name: str) -> MmtConfig:
    tokenizer = model.llm.tokenizer or model.llm.source
    return replace(
        model, llm=replace(model.llm, source=None, config=_published(LANGUAGES)[name].config, tokenizer=tokenizer)
    )


def _not_compilable(model: MmtConfig) -> str | None:
    if model.llm.kernels == "liger":
        return "model.llm.kernels liger, which torch.compile cannot trace"
    kind = model.adapter.kind
    return f"model.adapter.kind {kind}, which decides anew in every row" if is_routed(model.adapter) else None


ARCHITECTURE = Architecture(
    build=build_mmt,
    check_sources=check_sources,
    weight_files=weight_files,
    whole=lambda model: language_config("model.llm", model.llm.source, model.llm.config),
    sizes=(
        PublishedSizes(
            name="vision",
            what="ViT",
            example="vit-l/14-336",
            key="model.vision.source",
            networks=_published(TOWERS),
            assume=_assume_vision,
        ),
        PublishedSizes(
            name="llm",
            what="LLM",
            example="llama-2-7b",
            key="model.llm.source",
            networks=_published(LANGUAGES),
            assume=_assume_llm,
        ),
    ),
    not_compilable=_not_compilable,
)
