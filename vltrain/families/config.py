"""Which model of transformers a config.json means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from vltrain.errors import InputError, nearest


def config_class(where: str, values: Mapping[str, Any]) -> type[PreTrainedConfig]:
    """transformers' class for what `values` say. `where`: what they are from, for errors.

    Raises: InputError for a type that transformers does not know, and for one that would run code of its folder.
    """
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    if "auto_map" in values:
        raise InputError(
            f"{where}: a model of type {kind!r:.80} runs code of its own folder (auto_map), which is not run here; "
            "take a conversion to transformers' own classes"
        )
    if not isinstance(kind, str):
        raise InputError(f"{where}: model_type: found {kind!r:.80}, expected a name such as llava or qwen3_vl")
    raise InputError(
        f"{where}: model_type: found {kind!r:.80}, which transformers {transformers.__version__} does not know; "
        f"{nearest(kind, list(CONFIG_MAPPING))}; newer releases know more (pip install -U transformers)"
    )


def config_from(where: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that `values` describe. Raises InputError, also for values that no config can be made of."""
    known = config_class(where, values)
    try:
        return known.from_dict(dict(values))
    except Exception as error:  # whatever transformers' code runs into with such values
        raise cannot_make(where, known, error) from None


def cannot_make(where: str, known: type[PreTrainedConfig], error: Exception) -> InputError:
    """For values that transformers' code ran into `error` with."""
    told = " ".join(str(error).split())[:400]
    name = known.__name__.removesuffix("Config")
    return InputError(f"{where}: no {name} can be made of it ({type(error).__name__}: {told})")
