"""InstructBLIP as the other rooms see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from vltrain.config.model.instructblip import BlipModelConfig
from vltrain.models.instructblip.build import blip_weight_files, build_blip, check_blip_sources, trained_parts
from vltrain.models.instructblip.sizes import INSTRUCTBLIP
from vltrain.models.instructblip.weights import blip_config
from vltrain.models.interface import Architecture
from vltrain.models.resized import RANK, packed_bits, resized_updates, sizes_of

SECTIONS = ("vision_config", "qformer_config", "text_config")


def _configs(model: BlipModelConfig) -> dict[str, PreTrainedConfig]:
    return {"model": blip_config(model.instructblip.source, model.instructblip.config, None)}


def _resized(model: BlipModelConfig, small: Mapping[str, PreTrainedConfig]) -> BlipModelConfig:
    blip, config = model.instructblip, small["model"]
    parts: dict[str, Any] = {name: sizes_of(getattr(config, name)) for name in SECTIONS}
    for name in ("vision_config", "qformer_config"):
        del parts[name]["model_type"]
    text = config.text_config  # two that no field of T5's class says
    parts["text_config"] |= {
        name: getattr(text, name)
        for name in ("tie_word_embeddings", "decoder_start_token_id")
        if getattr(text, name, None) is not None
    }
    section = replace(
        blip,
        source=None,
        config={"num_query_tokens": config.num_query_tokens, **parts},
        tokenizer=blip.tokenizer or blip.source,
        qformer_tokenizer=blip.qformer_tokenizer or blip.source,
        adapters=None,
        attention="sdpa",
        kernels="torch",
        dropout=0.0,
        qformer=resized_updates(blip.qformer),
        llm=resized_updates(blip.llm),
        adalora=replace(blip.adalora, init_rank=RANK, target_rank=RANK - 1),
    )
    return replace(model, instructblip=section, bits=packed_bits(model.bits))


ARCHITECTURE = Architecture(
    build=build_blip,
    check_sources=check_blip_sources,
    weight_files=blip_weight_files,
    sizes=(INSTRUCTBLIP,),
    trained_parts=trained_parts,
    configs=_configs,
    resized=_resized,
)
