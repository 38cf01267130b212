"""Multimodal Model Tuning as the other rooms see it."""

from __future__ import annotations

from dataclasses import replace

from vltrain.config.model.mmt import MmtConfig
from vltrain.models.adapters import is_routed
from vltrain.models.backbones.clip import VITS
from vltrain.models.backbones.llama import LLMS
from vltrain.models.interface import Architecture, PublishedSizes
from vltrain.models.mmt.build import build_mmt, check_sources, weight_files
from vltrain.models.pretrained.clip_state import ACTIVATIONS


def _assume_vision(model: MmtConfig, name: str) -> MmtConfig:
    config = {**VITS[name].config, "hidden_act": ACTIVATIONS[model.vision.kind or "clip"]}
    return replace(model, vision=replace(model.vision, source=None, kind=None, config=config))


def _assume_llm(model: MmtConfig, name: str) -> MmtConfig:
    tokenizer = model.llm.tokenizer or model.llm.source
    return replace(model, llm=replace(model.llm, source=None, config=LLMS[name].config, tokenizer=tokenizer))


def _not_compilable(model: MmtConfig) -> str | None:
    if model.llm.kernels == "liger":
        return "model.llm.kernels liger, which torch.compile cannot trace"
    if model.llm.kernels == "liger":
        return "model.llm.kernels liger, which torch.compile cannot trace"
    kind = model.adapter.kind
    return f"model.adapter.kind {kind}, which decides anew in every row" if is_routed(model.adapter) else None


ARCHITECTURE = Architecture(
    build=build_mmt,
    check_sources=check_sources,
    weight_files=weight_files,
    sizes=(
        PublishedSizes(
            name="vision",
            what="ViT",
            example="vit-l/14-336",
            key="model.vision.source",
            networks=VITS,
            assume=_assume_vision,
        ),
        PublishedSizes(
            name="llm",
            what="LLaMA",
            example="llama-2-7b",
            key="model.llm.source",
            networks=LLMS,
            assume=_assume_llm,
        ),
    ),
    not_compilable=_not_compilable,
)
