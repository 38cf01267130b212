"""Multimodal Model Tuning as the other rooms see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedConfig

from vltrain.config.model.mmt import MmtConfig, VisionConfig
from vltrain.models.adapters import is_routed
from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.family import Family, Network
from vltrain.models.backbones.table import LANGUAGES, TOWERS, tower_of
from vltrain.models.interface import Architecture, PublishedSizes
from vltrain.models.mmt.build import build_mmt, check_sources, trained_parts, weight_files
from vltrain.models.pretrained.clip_state import ACTIVATIONS
from vltrain.models.pretrained.readers import language_config, tower_config
from vltrain.models.resized import packed_bits, resized_adapter, resized_updates, sizes_of

SMALL_NECK = 16


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


def _configs(model: MmtConfig) -> dict[str, PreTrainedConfig]:
    vision = tower_config("model.vision", model.vision.source, model.vision.config, model.vision.kind)
    return {"vision": vision, "llm": language_config("model.llm", model.llm.source, model.llm.config)}


def _resized(model: MmtConfig, small: Mapping[str, PreTrainedConfig]) -> MmtConfig:
    llm = model.llm
    depth, peft = small["llm"].num_hidden_layers, resized_updates(llm.peft)
    if peft.adapter_layers is not None:  # all blocks but one stand for some of many
        peft = replace(peft, adapter_layers=min(peft.adapter_layers, max(1, depth - 1)))
    language = replace(
        llm,
        source=None,
        config=sizes_of(small["llm"]),
        tokenizer=llm.tokenizer or llm.source,
        attention="sdpa",
        kernels="torch",
        peft=peft,
    )
    return replace(
        model,
        vision=_resized_vision(model, small["vision"]),
        llm=language,
        adapter=resized_adapter(model.adapter),
        neck=replace(model.neck, dim=min(model.neck.dim, SMALL_NECK)),
        bits=packed_bits(model.bits),
    )


def _resized_vision(model: MmtConfig, small: PreTrainedConfig) -> VisionConfig:
    """Two taps and, where the last blocks are not read, a block behind them; four squares of pooled patches."""
    vision, large = model.vision, _configs(model)["vision"]
    sizes, blocks = sizes_of(small), large.num_hidden_layers
    every, dead = min(vision.tap_every, 2), vision.tokens == "cls" and blocks % vision.tap_every > 0
    if vision.tokens == "cls":
        sizes["num_hidden_layers"] = min(2, blocks // vision.tap_every) * every + dead
    patches = 2 * vision.pool
    tower = tower_of(small)
    if "image_size" in sizes:
        sizes["image_size"] = patches * small.patch_size
    else:
        sizes["num_patches"] = patches**2
    given = vision.image_size is not None and vision.image_size != tower.image_size(large)
    return replace(
        vision,
        source=None,
        kind=None,
        peft=resized_updates(vision.peft),
        config=sizes,
        preprocessing="checkpoint",
        image_size=(patches + vision.pool) * small.patch_size if given else None,
        tap_every=every,
        blocks=None if vision.blocks is None else sizes["num_hidden_layers"] - (vision.blocks < blocks),
    )


ARCHITECTURE = Architecture(
    build=build_mmt,
    check_sources=check_sources,
    weight_files=weight_files,
    trained_parts=trained_parts,
    configs=_configs,
    resized=_resized,
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
