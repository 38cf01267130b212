"""From the section `mmt` of a recipe to a network whose trained parameters are exactly those the recipe means.

Each unit of the networks (embeddings, a block, the head) gets its weights, is quantised, gets its adapters and is
placed, in this order, before the next one has weights.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from vltrain.config.model.mmt import MmtConfig, PeftConfig, TowerPeftConfig
from vltrain.errors import InputError
from vltrain.files.locate import locate
from vltrain.models.adapters import Adapter, Routing, Sites, insert_adapters, is_routed
from vltrain.models.backbones.llm import empty_language, llm_blocks, llm_units, prepare_llm, tie_head
from vltrain.models.backbones.table import language_of, tower_of
from vltrain.models.backbones.towers import empty_tower, tower_blocks, tower_units
from vltrain.models.interface import Place
from vltrain.models.materialise import RandomWeights, Weights, assert_materialised
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.mmt.neck import make_neck
from vltrain.models.mmt.visual_tokens import VISUAL_TOKENS, VisualTokens
from vltrain.models.peft.lora import insert_lora, insert_peft, peft_parameters
from vltrain.models.pretrained.preprocessor import Preprocessing, read_preprocessing
from vltrain.models.pretrained.readers import language_config, open_language, open_tower, tower_config
from vltrain.models.quantise import QUANTISED_BITS, quantise_linears
from vltrain.models.random import seeded
from vltrain.ops.attention_choice import choose_attention
from vltrain.ops.liger import Kernels, choose_kernels

MODALITY_STD = 0.02  # as LLaMA's own token embeddings


@torch.no_grad()
def build_mmt(
    model: MmtConfig,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    device: torch.device | str,
    runs_on: torch.device | str,
    place: Place,
) -> MultimodalModel:
    """The network of a recipe, in training mode. Arguments and errors: those of
    `vltrain.models.build.build_model`."""
    model = as_placed(model)
    on_meta = torch.device(device).type == "meta"
    with torch.device("meta") if on_meta else nullcontext():
        clip = _empty_tower(model)
        preprocessing = _preprocessing(model, clip.config)
        vision = VISUAL_TOKENS[model.vision.tokens](clip, model.vision, activation_checkpointing, preprocessing)
        llm = _empty_llm(model, runs_on, dtype, log=not on_meta)
        weights = (None, None) if on_meta else _open_weights(model, clip, llm, dtype)
        routing = Routing() if is_routed(model.adapter) else None
        kernels = _kernels(model, llm.config, runs_on, log=not on_meta)
        prepare_llm(llm, activation_checkpointing, routing, kernels)
        _finish_vision(vision, model, weights[0], dtype, place)
        _finish_llm(llm, model, weights[1], dtype, place, routing)
        with seeded(model.seed, "neck"):
            neck = make_neck(vision.width, llm.config.hidden_size, model.neck)
        with seeded(model.seed, "modality"):
            modality_embedding = nn.Embedding(2, llm.config.hidden_size)
            nn.init.normal_(modality_embedding.weight, std=MODALITY_STD)
    built = MultimodalModel(vision, neck, modality_embedding, llm, routing)
    built.kernels = kernels
    _assert_trainable(built, trained_parts(model))
    if on_meta:
        return built.train()
    assert_materialised(built)
    if place is None:
        return built.to(device).train()
    place(neck)
    place(modality_embedding)
    return built.train()


def as_placed(model: MmtConfig) -> MmtConfig:
    """The settings with the adapters and peft's layers that are really put in: `tune: neck` has none."""
    if model.tune != "neck":
        return model
    adapter = dataclasses.replace(model.adapter, vision="none", llm="none")
    vision = dataclasses.replace(model.vision, peft=TowerPeftConfig())
    return dataclasses.replace(
        model, adapter=adapter, vision=vision, llm=dataclasses.replace(model.llm, peft=PeftConfig())
    )


def check_sources(model: MmtConfig) -> None:
    """Checks names and shapes of the weights' files, without reading them. Raises InputError."""
    _sources(model)


def weight_files(model: MmtConfig) -> dict[str, dict[str, Path]]:
    """See `vltrain.models.build.weight_files`."""
    named = zip(("model.vision.source", "model.llm.source"), _sources(model))
    return {key: one.files for key, one in named if one.files}


def _sources(model: MmtConfig) -> tuple[Weights, Weights]:
    llm = _empty_llm(model, "meta", torch.float32, log=False)
    return _open_weights(model, _empty_tower(model), llm, torch.float32)


def _empty_tower(model: MmtConfig) -> Any:
    config = tower_config("model.vision", model.vision.source, model.vision.config, model.vision.kind)
    return empty_tower(config, "eager" if model.llm.attention == "eager" else "sdpa")


def _kernels(model: MmtConfig, config: PreTrainedConfig, runs_on: torch.device | str, *, log: bool) -> Kernels:
    language = language_of(config)
    lacking = None if language.liger else f"it has none for a {language.title}"
    return choose_kernels(model.llm.kernels, runs_on, getattr(config, "hidden_act", ""), lacking=lacking, log=log)


def _preprocessing(model: MmtConfig, config: PreTrainedConfig) -> Preprocessing:
    """How images become what the tower reads, its size included."""
    vision, tower = model.vision, tower_of(config)
    own = tower.image_size(config)
    if vision.image_size is not None and not tower.any_size and vision.image_size != own:
        raise InputError(
            f"model.vision.image_size: found {vision.image_size}, expected null or {own}: the positions of a "
            f"{tower.title} fit no other square"
        )
    patch = config.patch_size
    if vision.image_size is not None and vision.image_size != own and vision.image_size % patch:
        raise InputError(
            f"model.vision.image_size: {vision.image_size} pixels, expected a multiple of a patch's {patch}"
        )
    size = vision.image_size or (None if tower.any_size else own)
    plain = Preprocessing(mean=tower.mean, std=tower.std, image_size=size or own)
    if vision.source is None or vision.preprocessing == "square":
        return plain
    return read_preprocessing("model.vision", vision.source, locate(vision.source), size, tower.processors, plain)


def _empty_llm(model: MmtConfig, device: torch.device | str, dtype: torch.dtype, *, log: bool = True) -> Any:
    config = language_config("model.llm", model.llm.source, model.llm.config)
    return empty_language(config, choose_attention(model.llm.attention, config, device, dtype, log=log))


def _open_weights(model: MmtConfig, clip: Any, llm: Any, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """Where the weights of ViT and LLM come from, checked against the empty networks."""
    parts = trained_parts(model)
    vision_dtype, llm_dtype = (
        torch.float32 if part in parts else _frozen_dtype(model, dtype) for part in ("vision", "llm")
    )
    vision_source, llm_source = model.vision.source, model.llm.source
    return (
        open_tower("model.vision", vision_source, clip, vision_dtype)
        if vision_source
        else RandomWeights(clip, model.seed, "vision"),
        open_language("model.llm", llm_source, llm, llm_dtype) if llm_source else RandomWeights(llm, model.seed, "llm"),
    )


def _frozen_dtype(model: MmtConfig, dtype: torch.dtype) -> torch.dtype:
    kept: dict[int | None, torch.dtype] = {16: torch.bfloat16, 32: torch.float32}
    return kept.get(model.bits, dtype)


def _finish_vision(
    vision: VisualTokens, model: MmtConfig, weights: Weights | None, dtype: torch.dtype, place: Place
) -> None:
    live = vision.live_blocks
    blocks = tower_blocks(vision.clip)
    unused = vision.unused_parameters()
    sites = Sites(norms=vision.tower.norms, sublayers=vision.tower.sublayers, width=vision.width)
    for name, unit in tower_units(vision.clip):
        trained = "vision" in trained_parts(model) and not unused.issuperset(unit.parameters())
        _load(name, unit, weights, trained, unit in blocks, model, dtype)
        for parameter in vision.unused_parameters() & set(unit.parameters()):  # now that they are there
            parameter.requires_grad_(False)
        if unit in live:
            insert_adapters(
                unit,
                live.index(unit),
                sites,
                model.adapter.vision,
                model.adapter,
                seed=model.seed,
                part="vision",
            )
            if (peft := model.vision.peft).kind is not None:
                insert_lora(unit, f"peft/vision/{name}", peft, peft.kind, model.seed, vision.tower, "model.vision.peft")
        if place is not None:
            place(unit)


def _finish_llm(
    llm: Any,
    model: MmtConfig,
    weights: Weights | None,
    dtype: torch.dtype,
    place: Place,
    routing: Routing | None,
) -> None:
    blocks, language = llm_blocks(llm), language_of(llm.config)
    sites = Sites(norms=language.norms, sublayers=language.sublayers, width=llm.config.hidden_size)
    for name, unit in llm_units(llm):
        _load(name, unit, weights, "llm" in trained_parts(model), unit in blocks, model, dtype)
        tie_head(llm)
        if unit in blocks:
            number = blocks.index(unit)
            insert_adapters(
                unit,
                number,
                sites,
                model.adapter.llm,
                model.adapter,
                seed=model.seed,
                part="llm",
                routing=routing,
            )
            insert_peft(unit, number, len(blocks), model.llm.peft, model.seed, language)
        if place is not None:
            place(unit)


def _load(
    name: str,
    unit: nn.Module,
    weights: Weights | None,
    trained: bool,
    is_block: bool,
    model: MmtConfig,
    dtype: torch.dtype,
) -> None:
    """Gives a unit its weights, in the dtype and bits that they will have."""
    if weights is not None:
        weights.fill(name, unit, torch.float32 if trained else _frozen_dtype(model, dtype))
    unit.requires_grad_(trained)
    if weights is not None and is_block and not trained and model.bits in QUANTISED_BITS:
        quantise_linears(unit, model.bits)


def trained_parts(model: MmtConfig) -> set[str]:
    """The parts (`MultimodalModel.PARTS`) whose parameters a recipe trains."""
    parts = {"neck", "modality"} | ({"adapter", "peft"} if model.tune != "neck" else set())
    full = model.tune == "full"
    return (
        parts | ({"vision"} if full or model.vision.train else set()) | ({"llm"} if full or model.llm.train else set())
    )


def _assert_trainable(model: MultimodalModel, parts: set[str]) -> None:
    """By module and by name: what is trained are whole adapters, peft's factors and prompts, neck and modality
    embedding, and a part's own weights if it is."""
    adapters = {
        parameter for module in model.modules() if isinstance(module, Adapter) for parameter in module.parameters()
    }
    expected = adapters | peft_parameters(model) | {*model.neck.parameters(), *model.modality_embedding.parameters()}
    for part, module in (("vision", model.vision), ("llm", model.llm)):
        expected |= set(module.parameters()) if part in parts else set()
    unused = model.vision.unused_parameters()
    expected -= unused
    by_name = {parameter for name, parameter in model.named_parameters() if model.part_of(name) in parts} - unused
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if len({parameter.requires_grad, parameter in expected, parameter in by_name}) > 1
    ]
    assert not wrong, f"parameters that are trained but should not be, or the other way round: {wrong}"
