"""Pretrained weights, in whichever layout they lie: Hugging Face folders and hub names, GGUF files, and the makers' own.

What a source is, its content says: a LLaMA in Meta's layout goes to `meta_llama`, a ViT's state dict with OpenAI-CLIP's names to
`clip_state`, the rest to transformers (safetensors, or torch files read with `weights_only`), which maps files and so holds one
copy of the weights at most. What is added there is refusal: transformers fills a missing weight with random numbers and drops
one it does not know, with a line in the log. Here a checkpoint that does not give the model exactly its weights is an
`InputError` that names the file and the keys.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from vltrain.errors import InputError, nearest
from vltrain.locate import locate
from vltrain.models.clip_state import ACTIVATIONS, clip_state_config, is_state_file, load_clip_state
from vltrain.models.meta_llama import is_meta_folder, load_meta_llama, meta_llama_config
from vltrain.models.tensor_files import TENSOR_FILE_SUFFIXES

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=PreTrainedConfig)
Model = TypeVar("Model", bound=PreTrainedModel)

# The other half of a whole CLIP, and buffers that older files hold; a CLIPVisionModel has no use for them.
CLIP_IGNORED = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$|.*\bposition_ids$")
LLAMA_IGNORED = re.compile(r".*\brotary_emb\.inv_freq$")
# What reading a broken or foreign file ends in, by format: JSON, safetensors, pickle, GGUF (a binary layout read field by field).
LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError, pickle.UnpicklingError, struct.error, IndexError,
    StrictDataclassError,
)  # fmt: skip


def llama_config(key: str, source: str | None, values: dict[str, Any]) -> LlamaConfig:
    """The LLM's sizes: those of the checkpoint `source`, or `values` for random weights.

    Raises: InputError for a checkpoint of another architecture, unknown names, and sizes that do not fit each other. `key`
        (`model.llm`) is named in it.
    """
    if source is not None:
        path = _located(key, source)
        return meta_llama_config(key, Path(path)) if is_meta_folder(path) else _read_config(key, source, LlamaConfig, ("llama",))
    config = _config_from_values(key, LlamaConfig, values)
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{key}.config: {config.num_attention_heads} attention heads cannot share {config.num_key_value_heads} key-value heads "
            "evenly; num_attention_heads must be a multiple of num_key_value_heads"
        )
    return config


def clip_config(key: str, source: str | None, values: dict[str, Any], kind: str | None = None) -> CLIPVisionConfig:
    """The ViT's sizes, as `llama_config`; of a whole CLIP, its vision part's.

    Args:
        kind: whose ViT it is, a name of `clip_state.ACTIVATIONS`: needed for a state dict. What brings a config must agree with it.
    """
    if source is None:
        return _config_from_values(key, CLIPVisionConfig, values)
    path = _located(key, source)
    if is_state_file(path):
        return clip_state_config(key, Path(path), kind)
    config = _read_config(key, source, CLIPVisionConfig, ("clip_vision_model", "clip"))
    if kind is not None and config.hidden_act != ACTIVATIONS[kind]:
        raise InputError(
            f"{key}.kind: '{kind}' has the activation {ACTIVATIONS[kind]}, but the config.json of '{source}' ({path}) says "
            f"{config.hidden_act}; leave the kind out, or mend the file"
        )
    return config


def load_llama(key: str, source: str, config: LlamaConfig, dtype: torch.dtype, attention: str) -> LlamaForCausalLM:
    """A LLaMA with the weights of `source` in `dtype`; GGUF weights come out dequantised.

    Raises: InputError for a file that is missing or broken, and for weights that are missing, unknown or of another shape.
    """
    path = _located(key, source)
    if is_meta_folder(path):
        llm = load_meta_llama(key, Path(path), config, dtype, attention)
        logger.info("%s: LLaMA in Meta's layout from %s", key, path)
        return llm
    llm = _load(key, source, LlamaForCausalLM, config, dtype, attention, LLAMA_IGNORED)
    # From GGUF the weights are plain tensors by now, yet the marks of a quantised model would forbid training and saving.
    llm.is_quantized, llm.hf_quantizer = False, None
    llm.config.__dict__.pop("quantization_config", None)
    return llm


def load_clip(key: str, source: str, config: CLIPVisionConfig, dtype: torch.dtype, attention: str) -> CLIPVisionModel:
    """A ViT with the weights of `source`: a `CLIPVisionModel`, a whole `CLIPModel`, or a state dict. Raises: as `load_llama`."""
    path = _located(key, source)
    if is_state_file(path):
        clip = load_clip_state(key, Path(path), config, dtype, attention)
        logger.info("%s: ViT with OpenAI-CLIP's names from %s", key, path)
        return clip
    return _load(key, source, CLIPVisionModel, config, dtype, attention, CLIP_IGNORED)


def _config_from_values(key: str, config_class: type[Config], values: dict[str, Any]) -> Config:
    known = {entry.name for entry in fields(config_class)}
    for name in values:
        if name not in known:
            raise InputError(f"{key}.config.{name}: {config_class.__name__} has no such setting; {nearest(name, known)}")
    try:
        config = config_class(**values)
    except StrictDataclassError as error:
        raise InputError(f"{key}.config: {' '.join(str(error).split())}") from None
    if config.hidden_act not in ACT2FN:
        raise InputError(f"{key}.config.hidden_act: found '{config.hidden_act}'; {nearest(config.hidden_act, ACT2FN)}")
    return config


def _read_config(key: str, source: str, config_class: type[Config], model_types: tuple[str, ...]) -> Config:
    place, arguments = _place(key, source)
    try:
        with _quiet_transformers():
            found, _ = PreTrainedConfig.get_config_dict(place, **arguments)
            model_type = found.get("model_type")
            if model_type in model_types:
                return config_class.from_dict(found["vision_config"] if model_type == "clip" else found)
    except LOAD_ERRORS as error:
        raise _cannot_load(key, source, place, error) from None
    raise InputError(
        f"{key}.source: '{source}' ({place}) is a model of type {model_type!r}, expected {' or '.join(map(repr, model_types))}"
    )


def _load(
    key: str, source: str, model_class: type[Model], config: PreTrainedConfig, dtype: torch.dtype, attention: str, ignored: re.Pattern[str]
) -> Model:
    place, arguments = _place(key, source)
    try:
        with _quiet_transformers():
            # Mismatched shapes are let through here, to be named below together with everything else that is wrong.
            model, report = model_class.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
    except LOAD_ERRORS as error:
        raise _cannot_load(key, source, place, error) from None
    shapes = {name: f" {list(found)}, expected {list(expected)}" for name, found, expected in report["mismatched_keys"]}
    problems = {
        "missing": sorted(report["missing_keys"]),
        "not of this model": sorted(name for name in report["unexpected_keys"] if not ignored.match(name)),
        "of another shape": sorted(shapes),
    }
    if any(problems.values()):
        files = _files_of_weights(Path(place))
        named = {
            problem: [f"{name}{shapes.get(name, '')}{f' ({files[name]})' if name in files else ''}" for name in names]
            for problem, names in problems.items()
        }
        told = "; ".join(f"{len(names)} {problem}: {_some(names)}" for problem, names in named.items() if names)
        raise InputError(
            f"{key}.source: the weights of '{source}' ({place}) do not fit a {model_class.__name__} of its config.json. Weights {told}"
        )
    logger.info("%s: %s from %s", key, model_class.__name__, place)
    return model


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
            f"{key}.source: '{source}' is a file ({path}); expected a .gguf file, a folder with weights, or for a ViT a state dict "
            f"({', '.join(TENSOR_FILE_SUFFIXES)})"
        )
    return os.path.dirname(path), {"gguf_file": os.path.basename(path)}


def _cannot_load(key: str, source: str, place: str, error: Exception) -> InputError:
    where = _broken_file(Path(place)) or place
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return InputError(
        f"{key}.source: cannot load '{source}' from {where} ({type(error).__name__}: {reason}). Fetch it again, or name another source"
    )


def _broken_file(folder: Path) -> str | None:
    """The first file of `folder` that is not what its name says, and what it should be; the errors of a load do not name it."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            json.loads(path.read_text())
        except (OSError, ValueError):
            return f"{path}: not JSON"
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                continue
        except (SafetensorError, OSError):
            return f"{path}: not a whole safetensors file"
    return None


def _files_of_weights(folder: Path) -> dict[str, str]:
    """Which shard of a loadable folder holds each weight, or by the index should hold it; empty where there are no shards."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    files = dict(json.loads(index.read_text())["weight_map"])
    for name in sorted(set(files.values())):
        with safe_open(folder / name, framework="pt") as shard:
            files |= dict.fromkeys(shard.keys(), name)
    return files


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' load report and progress bars: what they would tell is checked and raised here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
