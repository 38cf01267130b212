"""Pretrained weights, in whichever layout they lie: Hugging Face folders and hub names, GGUF files, and the makers'
own.

What a source is, its content says: its family's own layouts (`Family.layouts`) are asked first, the rest goes to
`hugging_face`. Each gives the sizes first, then, for an empty network of these sizes, its weights unit by unit
(`materialise.Weights`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.models.backbones.family import Family, Layout, Tower
from vltrain.models.backbones.llm import empty_language, llm_units, tie_head
from vltrain.models.backbones.table import LANGUAGES, TOWERS, language_of, tower_of
from vltrain.models.backbones.towers import empty_tower, tower_units
from vltrain.models.materialise import Weights, assert_materialised
from vltrain.models.pretrained.checkpoint_config import read_values, try_config
from vltrain.models.pretrained.clip_state import ACTIVATIONS
from vltrain.models.pretrained.gguf_file import GgufWeights, read_header, with_rope_factors
from vltrain.models.pretrained.hugging_face import Beside, HuggingFaceWeights, has_own_head
from vltrain.models.pretrained.rotary import rotary_frequencies
from vltrain.models.pretrained.tensor_files import TENSOR_FILE_SUFFIXES

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def language_config(key: str, source: str | None, values: dict[str, Any]) -> PreTrainedConfig:
    """The LLM's sizes: those of the checkpoint `source`, or `values` (and its `model_type`, if not llama) for random
    weights.

    Raises:
        InputError: a checkpoint of no known family, unknown names, and sizes that do not fit each other. `key`
            (`model.llm`) is named in it.
    """
    if source is None:
        return _config_from_values(key, LANGUAGES.values(), values)
    path = _located(key, source)
    layout = _own_layout(LANGUAGES.values(), path)
    if layout is not None:
        return layout.config(key, Path(path), None)
    config = _read_config(key, source, LANGUAGES.values())
    if (
        config.tie_word_embeddings
        and not path.endswith(".gguf")
        and has_own_head(key, source, path, HEAD, (TABLE, TABLE.removeprefix("model.")))
    ):
        config.tie_word_embeddings = False
    return config


def tower_config(key: str, source: str | None, values: dict[str, Any], kind: str | None = None) -> PreTrainedConfig:
    """The ViT's sizes, as `language_config`; of a whole of tower and text, its vision part's.

    Args:
        kind: whose ViT it is, a name of `clip_state.ACTIVATIONS`: needed for a state dict. What brings a config must
            agree with it.
    """
    if source is None:
        return _config_from_values(key, TOWERS.values(), values)
    path = _located(key, source)
    layout = _own_layout(TOWERS.values(), path)
    if layout is not None:
        return layout.config(key, Path(path), kind)
    config = _read_config(key, source, TOWERS.values())
    if kind is not None and config.hidden_act != ACTIVATIONS[kind]:
        raise InputError(
            f"{key}.kind: '{kind}' has the activation {ACTIVATIONS[kind]}, but the config.json of '{source}' "
            f"({path}) says "
            f"{config.hidden_act}; leave the kind out, or fix the file"
        )
    return config


def open_language(key: str, source: str, network: Any, dtype: torch.dtype) -> Weights:
    """The weights of `source` for an empty network of the sizes that `language_config` says.

    Args:
        dtype: most of them will be asked for in it; a GGUF file is dequantised to it.

    Raises: InputError for a file that is missing or broken, and for weights that are missing, unknown or of another
    shape. Of a GGUF
        file that is told when it is read.
    """
    path = _located(key, source)
    layout = _own_layout([language_of(network.config)], path)
    if layout is not None:
        return layout.weights(key, Path(path), network)
    names = {name for name, _ in network.named_parameters()}

    def ours(name: str) -> str:
        return f"model.{name}" if f"model.{name}" in names else name  # of an LLM saved without its head

    copies = {HEAD: TABLE} if network.config.tie_word_embeddings else {}
    return _open(key, source, network, dtype, ours, Beside(copies=copies, rotary=rotary_frequencies(network.config)))


def open_tower(key: str, source: str, network: Any, dtype: torch.dtype) -> Weights:
    """As `open_language`, of a ViT, or of a whole that it is part of."""
    path = _located(key, source)
    tower = tower_of(network.config)
    layout = _own_layout([tower], path)
    if layout is not None:
        return layout.weights(key, Path(path), network)

    def ours(name: str) -> str:
        name = name.removeprefix("vision_model.")
        for pattern, replacement in tower.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    return _open(key, source, network, dtype, ours, Beside(unused=tower.others))


def load_language(key: str, source: str, config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> Any:
    """A plain LLM with the weights of `source` in `dtype`. Raises: as `open_language`."""
    llm = empty_language(config, attention)
    weights = open_language(key, source, llm, dtype)
    for name, unit in llm_units(llm):
        weights.fill(name, unit, dtype)
        tie_head(llm)
    assert_materialised(llm)
    return llm


def load_tower(key: str, source: str, config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> Any:
    """A plain ViT with the weights of `source` in `dtype`. Raises: as `open_tower`."""
    network = empty_tower(config, attention)
    weights = open_tower(key, source, network, dtype)
    for name, unit in tower_units(network):
        weights.fill(name, unit, dtype)
    assert_materialised(network)
    return network


def _own_layout(families: Iterable[Family], path: str) -> Layout | None:
    return next((layout for family in families for layout in family.layouts if layout.is_it(path)), None)


def _config_from_values(key: str, families: Iterable[Family], values: dict[str, Any]) -> Any:
    by_type = {family.model_types[0]: family for family in families}
    given = dict(values)
    model_type = given.pop("model_type", next(iter(by_type)))
    if model_type not in by_type:
        raise InputError(f"{key}.config.model_type: found {model_type!r:.80}, expected one of {', '.join(by_type)}")
    family = by_type[model_type]
    known = {entry.name for entry in fields(family.config)}
    for name in given:
        if name not in known:
            raise InputError(
                f"{key}.config.{name}: {family.config.__name__} has no such setting; {nearest(name, known)}"
            )
    where = f"{key}.config."
    config = try_config(where, given, lambda sizes: family.config(**sizes), family.network)
    return _supported(where, family, config)


def _read_config(key: str, source: str, families: Iterable[Family]) -> Any:
    place, arguments = _place(key, source)
    path, factors = Path(place, arguments.get("gguf_file", "config.json")), None
    if arguments:
        factors = read_header(key, source, str(path))
    found = read_values(key, source, place, arguments)
    model_type = found.get("model_type")
    by_type = {name: family for family in families for name in family.model_types}
    wholes = {
        name: (whole, family)
        for family in families if isinstance(family, Tower) for name, whole in family.whole.items()
    }  # fmt: skip
    if model_type in wholes:  # whose older files say its parts twice: transformers' own reading of both counts
        whole, family = wholes[model_type]
        where, section = f"{key}.source: {path}: ", "vision_config."
        config = try_config(where, found, lambda given: whole.from_dict(given).vision_config, family.network, section)
        return _supported(f"{where}{section}", family, config)
    if model_type not in by_type:
        raise InputError(
            f"{key}.source: '{source}' ({place}) is a model of type {model_type!r:.80}, expected "
            f"{' or '.join(map(repr, [*by_type, *wholes]))}"
        )
    where, family = f"{key}.source: {path}: ", by_type[model_type]
    values = with_rope_factors(key, str(path), found, factors)
    return _supported(where, family, try_config(where, values, family.config.from_dict, family.network))


def _supported(where: str, family: Family, config: Any) -> Any:
    """`config`; raises InputError for what of the family is not supported, here or with this transformers."""
    if family.since is not None and not is_transformers_at_least(family.since):
        raise InputError(
            f"{where}model_type: a {family.title} needs transformers {family.since} or newer, found "
            f"{transformers.__version__}: pip install -U transformers"
        )
    if lacking := family.lacks(config):
        raise InputError(f"{where}{lacking}; it is not supported")
    return config


def is_transformers_at_least(release: str) -> bool:
    """Whether the installed transformers is of that release (MAJOR.MINOR) or a newer one."""
    found, due = (tuple(map(int, one.split(".")[:2])) for one in (transformers.__version__, release))
    return found >= due


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
