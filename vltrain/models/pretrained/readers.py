"""Pretrained weights, in whichever layout they lie: Hugging Face folders and hub names, GGUF files, and the makers'
own.

What a source is, its content says: a LLaMA in Meta's layout goes to `meta_llama`, a ViT's state dict with OpenAI-CLIP's
names to `clip_state`, the rest to `hugging_face`. Each gives the sizes first, then, for an empty network of these
sizes, its weights unit by unit (`materialise.Weights`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.models.backbones.llm import empty_llama, llm_units, tie_head
from vltrain.models.backbones.vision import vision_units
from vltrain.models.materialise import Weights, assert_materialised, empty_model
from vltrain.models.pretrained.checkpoint_config import read_values, try_config
from vltrain.models.pretrained.clip_state import ACTIVATIONS, ClipStateWeights, clip_state_config, is_state_file
from vltrain.models.pretrained.gguf_file import GgufWeights, read_header, with_rope_factors
from vltrain.models.pretrained.hugging_face import Beside, HuggingFaceWeights, has_own_head
from vltrain.models.pretrained.meta_llama import MetaWeights, is_meta_folder, meta_llama_config
from vltrain.models.pretrained.rotary import rotary_frequencies
from vltrain.models.pretrained.tensor_files import TENSOR_FILE_SUFFIXES

Config = TypeVar("Config", bound=PreTrainedConfig)

# The other half of a whole CLIP, and what leads into the space that both share: none of it is in a CLIPVisionModel.
OTHER_TOWER = re.compile(r"text_model\.|text_projection\.|visual_projection\.weight$|logit_scale$")
NETWORKS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    LlamaConfig: LlamaForCausalLM,
    CLIPVisionConfig: CLIPVisionModel,
}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def llama_config(key: str, source: str | None, values: dict[str, Any]) -> LlamaConfig:
    """The LLM's sizes: those of the checkpoint `source`, or `values` for random weights.

    Raises: InputError for a checkpoint of another architecture, unknown names, and sizes that do not fit each other.
    `key`
        (`model.llm`) is named in it.
    """
    if source is not None:
        path = _located(key, source)
        if is_meta_folder(path):
            return meta_llama_config(key, Path(path))
        config = _read_config(key, source, LlamaConfig, ("llama",))
        if (
            config.tie_word_embeddings
            and not path.endswith(".gguf")
            and has_own_head(key, source, path, HEAD, (TABLE, TABLE.removeprefix("model.")))
        ):
            config.tie_word_embeddings = False
        return config
    return _config_from_values(key, LlamaConfig, values)


def clip_config(key: str, source: str | None, values: dict[str, Any], kind: str | None = None) -> CLIPVisionConfig:
    """The ViT's sizes, as `llama_config`; of a whole CLIP, its vision part's.

    Args:
        kind: whose ViT it is, a name of `clip_state.ACTIVATIONS`: needed for a state dict. What brings a config must
            agree with it.
    """
    if source is None:
        return _config_from_values(key, CLIPVisionConfig, values)
    path = _located(key, source)
    if is_state_file(path):
        return clip_state_config(key, Path(path), kind)
    config = _read_config(key, source, CLIPVisionConfig, ("clip_vision_model", "clip"))
    if kind is not None and config.hidden_act != ACTIVATIONS[kind]:
        raise InputError(
            f"{key}.kind: '{kind}' has the activation {ACTIVATIONS[kind]}, but the config.json of '{source}' "
            f"({path}) says "
            f"{config.hidden_act}; leave the kind out, or fix the file"
        )
    return config


def open_llama(key: str, source: str, network: LlamaForCausalLM, dtype: torch.dtype) -> Weights:
    """The weights of `source` for an empty network of the sizes that `llama_config` says.

    Args:
        dtype: most of them will be asked for in it; a GGUF file is dequantised to it.

    Raises: InputError for a file that is missing or broken, and for weights that are missing, unknown or of another
    shape. Of a GGUF
        file that is told when it is read.
    """
    path = _located(key, source)
    if is_meta_folder(path):
        return MetaWeights(key, Path(path), network)
    names = {name for name, _ in network.named_parameters()}

    def ours(name: str) -> str:
        return f"model.{name}" if f"model.{name}" in names else name  # of a LLaMA saved without its head

    copies = {HEAD: TABLE} if network.config.tie_word_embeddings else {}
    return _open(key, source, network, dtype, ours, Beside(copies=copies, rotary=rotary_frequencies(network.config)))


def open_clip(key: str, source: str, network: CLIPVisionModel, dtype: torch.dtype) -> Weights:
    """As `open_llama`, of a ViT: a `CLIPVisionModel`, a whole `CLIPModel`, or a state dict with OpenAI-CLIP's names."""
    path = _located(key, source)
    if is_state_file(path):
        return ClipStateWeights(key, Path(path), network)
    return _open(
        key, source, network, dtype, lambda name: name.removeprefix("vision_model."), Beside(unused=OTHER_TOWER)
    )


def load_llama(key: str, source: str, config: LlamaConfig, dtype: torch.dtype, attention: str) -> LlamaForCausalLM:
    """A plain LLaMA with the weights of `source` in `dtype`. Raises: as `open_llama`."""
    llm = empty_llama(config, attention)
    weights = open_llama(key, source, llm, dtype)
    for name, unit in llm_units(llm):
        weights.fill(name, unit, dtype)
        tie_head(llm)
    assert_materialised(llm)
    return llm


def load_clip(key: str, source: str, config: CLIPVisionConfig, dtype: torch.dtype, attention: str) -> CLIPVisionModel:
    """A plain ViT with the weights of `source` in `dtype`. Raises: as `open_clip`."""
    clip = empty_model(CLIPVisionModel, config, attention)
    weights = open_clip(key, source, clip, dtype)
    for name, unit in vision_units(clip):
        weights.fill(name, unit, dtype)
    assert_materialised(clip)
    return clip


def _config_from_values(key: str, config_class: type[Config], values: dict[str, Any]) -> Config:
    known = {entry.name for entry in fields(config_class)}
    for name in values:
        if name not in known:
            raise InputError(
                f"{key}.config.{name}: {config_class.__name__} has no such setting; {nearest(name, known)}"
            )
    return try_config(f"{key}.config.", values, lambda given: config_class(**given), NETWORKS[config_class])


def _read_config(key: str, source: str, config_class: type[Config], model_types: tuple[str, ...]) -> Config:
    place, arguments = _place(key, source)
    path, factors = Path(place, arguments.get("gguf_file", "config.json")), None
    if arguments:
        factors = read_header(key, source, str(path))
    found = read_values(key, source, place, arguments)
    model_type = found.get("model_type")
    if model_type not in model_types:
        raise InputError(
            f"{key}.source: '{source}' ({place}) is a model of type {model_type!r:.80}, expected "
            f"{' or '.join(map(repr, model_types))}"
        )
    if model_type == "clip":  # whose older files say its parts twice: transformers' own reading of both counts
        return try_config(
            f"{key}.source: {path}: ",
            found,
            lambda given: CLIPConfig.from_dict(given).vision_config,
            NETWORKS[config_class],
            "vision_config.",
        )
    return try_config(
        f"{key}.source: {path}: ",
        with_rope_factors(key, str(path), found, factors),
        config_class.from_dict,
        NETWORKS[config_class],
    )


def _open(
    key: str, source: str, network: PreTrainedModel, dtype: torch.dtype, ours: Callable[[str], str], beside: Beside
) -> Weights:
    place, arguments = _place(key, source)
    if "gguf_file" in arguments:
        return GgufWeights(key, source, place, arguments["gguf_file"], network, dtype)
    return HuggingFaceWeights(key, source, place, network, ours, beside)


def _located(key: str, source: str) -> str:
    try:
        return locate(source)
    except InputError as error:
        raise InputError(f"{key}.source: {error}") from None


def _place(key: str, source: str) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` is to be called with: (folder or hub name, further arguments)."""
    path = _located(key, source)
    if not os.path.isfile(path):
        return path, {}
    if not path.endswith(".gguf"):
        raise InputError(
            f"{key}.source: '{source}' is a file ({path}); expected a .gguf file, a folder with weights, or for "
            "a ViT a state dict "
            f"({', '.join(TENSOR_FILE_SUFFIXES)})"
        )
    return os.path.dirname(path), {"gguf_file": os.path.basename(path)}
