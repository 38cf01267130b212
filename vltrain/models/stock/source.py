"""Which model `model.stock` means: its config, and transformers' class for it. No weights are read here.

Refused is what cannot be packed exactly or would run somebody's code: remote code, encoder-decoders, cross-attention
between text and image, models whose images cannot be encoded apart.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vltrain.config.model.stock import StockSection
from vltrain.errors import InputError, nearest
from vltrain.families.table import family_of
from vltrain.files.locate import locate
from vltrain.models.pretrained.checkpoint_config import read_values
from vltrain.models.pretrained.quiet import quiet_transformers

KEY = "model.stock"


def stock_place(section: StockSection) -> str:
    """Folder or hub name of the model. Raises InputError."""
    assert section.source is not None, "asked of a model with a source only"
    try:
        return locate(section.source)
    except InputError as error:
        raise InputError(f"{KEY}.source: {error}") from None


def stock_config(section: StockSection) -> PreTrainedConfig:
    """The model's config: that of the checkpoint `source`, or `config` for random weights; a new object each time.

    Raises: InputError for a model that is none of transformers' vision-language models, or that is refused (see above),
    and for values that no network can be made of.
    """
    if section.source is None:
        where, values = f"{KEY}.config", copy.deepcopy(section.config)
    else:
        place = stock_place(section)
        where = f"{KEY}.source: {Path(place, 'config.json') if Path(place).is_dir() else place}"
        values = read_values(KEY, section.source, place, {})
    config_class = _config_class(where, values)
    try:
        with quiet_transformers():
            config = config_class.from_dict(values)
            _require_usable(where, config)
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                network = network_class(config)._from_config(config)
    except InputError:
        raise
    except Exception as error:  # whatever transformers' code runs into with such values
        told = " ".join(str(error).split())[:400]
        raise InputError(
            f"{where}: no {config_class.__name__.removesuffix('Config')} can be made of it "
            f"({type(error).__name__}: {told})"
        ) from None
    _require_separable(where, network)
    return config


def network_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class for a config of `stock_config`."""
    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _config_class(where: str, values: dict[str, Any]) -> type[PreTrainedConfig]:
    model_type = values.get("model_type")
    known = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)  # asking the classes would import hundreds of modules
    if isinstance(model_type, str) and model_type in known:
        return CONFIG_MAPPING[model_type]
    if "auto_map" in values:
        raise InputError(
            f"{where}: a model of type {model_type!r:.80} runs code of its own folder (auto_map), which is not run "
            f"here; take a conversion to transformers' own classes"
        )
    if not isinstance(model_type, str):
        raise InputError(f"{where}: model_type: found {model_type!r:.80}, expected a name such as llava or qwen3_vl")
    if model_type in CONFIG_MAPPING:
        raise InputError(f"{where}: a model of type {model_type!r} is no vision-language model of transformers")
    raise InputError(
        f"{where}: model_type: transformers {transformers.__version__} knows no vision-language model of type "
        f"{model_type!r:.80}; {nearest(model_type, known)}; newer releases know more (pip install -U transformers)"
    )


def _require_usable(where: str, config: PreTrainedConfig) -> None:
    """Raises InputError for kinds of models that are refused."""
    kind = config.model_type
    refused = family_of(kind).refused
    if refused is not None:
        raise InputError(f"{where}: a model of type {kind!r} cannot be trained: {refused}")
    text = config.get_text_config()
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise InputError(
            f"{where}: a model of type {kind!r} is an encoder-decoder, whose answers are no part of a packed row; "
            "expected a decoder that reads images among its tokens"
        )
    if getattr(text, "cross_attention_layers", None) or getattr(text, "cross_layer_interval", None):
        raise InputError(
            f"{where}: a model of type {kind!r} looks at images by cross-attention, which is not packed here; "
            "expected a decoder that reads images among its tokens"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{where}: quantization_config is there, expected plain weights; for fewer bits say model.bits"
        )
    if getattr(config, "image_token_id", None) is None:
        raise InputError(
            f"{where}: a model of type {kind!r} has no image_token_id, so nothing says where an image's tokens stand"
        )
    if not 0 <= config.image_token_id < text.vocab_size:
        raise InputError(
            f"{where}: image_token_id: found {config.image_token_id!r:.80}, expected an id below vocab_size = "
            f"{text.vocab_size}"
        )


def _require_separable(where: str, network: PreTrainedModel) -> None:
    """Raises InputError unless images can be encoded apart from the text and handed in."""
    core: Any = network.base_model
    takes = inspect.signature(type(core).forward).parameters
    if core is network or not hasattr(core, "get_image_features") or "mm_encoder_outputs" not in takes:
        raise InputError(
            f"{where}: a model of type {network.config.model_type!r} cannot be handed images that were encoded before "
            f"(its {type(core).__name__} of transformers {transformers.__version__} lacks get_image_features or "
            "mm_encoder_outputs); transformers 5.24 or newer, and one of its LLaVA-like families"
        )
