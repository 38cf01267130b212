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
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vltrain.config.model.stock import StockSection
from vltrain.errors import InputError
from vltrain.families.config import cannot_make, config_class
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
    known = _vision_class(where, values)
    try:
        with quiet_transformers():
            config = known.from_dict(values)
            _require_usable(where, config)
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                network = network_class(config)._from_config(config)
    except InputError:
        raise
    except Exception as error:  # whatever transformers' code runs into with such values
        raise cannot_make(where, known, error) from None
    _require_separable(where, network)
    return config


def require_stock(where: str, config: PreTrainedConfig) -> None:
    """Raises InputError for a config of a kind of models that is refused."""
    _require_usable(where, config)


def network_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class for a config of `stock_config`."""
    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _vision_class(where: str, values: dict[str, Any]) -> type[PreTrainedConfig]:
    found = config_class(where, values)
    if (
        values["model_type"] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):  # the classes would be imported, if asked
        raise InputError(
            f"{where}: a model of type {values['model_type']!r} is no vision-language model of transformers"
        )
    return found


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
