"""Sizes of a network from a checkpoint's config.json or a recipe's mapping: read, and tried, before anything is built
with them.

transformers takes many values that its networks then fail on, or that mean what cannot be: a padding token beyond the
vocabulary, an activation that it has not, a factor of zero. So each config is tried here: numbers have ranges, and a
network of one block is made without memory. What raises there is one line that names the file and the key.

Rotary frequencies must be a function of the position alone: rows are packed, so frequencies that follow the longest
sequence of a batch (`dynamic`, `longrope` beyond its first length) would make a sample's loss depend on its neighbours,
and on what was seen before.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Phi3Config, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from vltrain.config.ranges import Range
from vltrain.errors import InputError, nearest
from vltrain.models.pretrained.quiet import LOAD_ERRORS, cannot_load, quiet_transformers, read_settings

Config = TypeVar("Config", bound=PreTrainedConfig)

_SIZE, _LAYERS = Range(1, 2**24), Range(1, 4096)
_RATE, _EPSILON = Range(0, 1, open_high=True), Range(0, 1, open_low=True)
# Of numbers in any config or section of one, by their names.
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
            "image_size",
            "patch_size",
            "projection_dim",
            "encoder_hidden_size",
            "cross_attention_frequency",
            "num_query_tokens",
            "d_model",
            "d_kv",
            "d_ff",
            "num_heads",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon"), _EPSILON),
    **dict.fromkeys(
        (
            "attention_dropout",
            "dropout_rate",
            "classifier_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "dropout",
        ),
        _RATE,
    ),
    "num_channels": Range(3, 3, hint=", since images are RGB"),
    "initializer_range": Range(0, 1e3),
    "initializer_factor": Range(0, 1e3),
}
ACTIVATIONS = ("hidden_act", "dense_act_fn")
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
# What other networks compute by: the values under which it changes nothing, for classes that keep it without having
# such a setting of their own.
UNREAD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "sliding_window",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
            "attention_multiplier",
            "clip_qkv",
            "no_rope_layers",
        ),
        (),
    ),
    **dict.fromkeys(
        (
            "logits_scaling",
            "logit_scale",
            "embedding_multiplier",
            "residual_multiplier",
            "scale_emb",
            "partial_rotary_factor",
            "num_local_experts",
            "num_experts",
        ),
        (1,),
    ),
    **dict.fromkeys(
        (
            "use_qk_norm",
            "qk_norm",
            "qk_layernorm",
            "rope_interleaved",
            "alibi",
            "use_parallel_residual",
            "attn_temperature_tuning",
        ),
        (False,),
    ),
    "position_embedding_type": ("absolute", "rope"),
    "use_qformer_text_input": (True,),
}
POSITION_ONLY = ("default", "linear", "yarn", "llama3")  # rotary frequencies that depend on nothing else
_THETA, _FACTOR = Range(1, 1e15), Range(0, 1e6, open_low=True)


def read_values(key: str, source: str, place: str, arguments: dict[str, str]) -> dict[str, Any]:
    """What a source's config.json (or GGUF header) says, as transformers reads it. Raises InputError."""
    path = Path(place, "config.json")
    if arguments:
        stat = os.stat(Path(place, arguments["gguf_file"]))
        found = copy.deepcopy(
            _gguf_values(key, source, place, arguments["gguf_file"], (stat.st_size, stat.st_mtime_ns))
        )
    else:
        if path.is_file():
            read_settings(key, source, path)
        found = _values(key, source, place)
    for name, what in (
        ("quantization_config", "holds quantised weights"),
        ("transformers_weights", "names another file of weights"),
    ):
        if found.get(name) is not None:
            raise InputError(
                f"{key}.source: {path}: {name} is there, so the checkpoint {what}, which is not read here; take "
                "the plain one"
            )
    return found


@functools.lru_cache(maxsize=16)  # by the file as it is: a header with its vocabulary takes seconds to read
def _gguf_values(key: str, source: str, place: str, file: str, identity: tuple[int, int]) -> dict[str, Any]:
    return _values(key, source, place, gguf_file=file)


def _values(key: str, source: str, place: str, **arguments: str) -> dict[str, Any]:
    try:
        with quiet_transformers():
            return PreTrainedConfig.get_config_dict(place, **arguments)[0]
    except LOAD_ERRORS as error:
        raise cannot_load(key, source, place, error) from None


def try_config(
    where: str,
    values: dict[str, Any],
    make: Callable[[dict[str, Any]], Config],
    network: type[PreTrainedModel],
    section: str = "",
) -> Config:
    """The config that `make` makes of `values`, after a network of one block was made of it.

    Args:
        where: what stands before a key in errors: `FILE: ` or `SETTING.`.
        network: the class that will be built.
        section: `NAME.` where `make` gives that section of the values alone.

    Raises: InputError naming `where` and the key, for whatever fails.
    """
    config, problem = _attempt(values, make, network, section)
    if config is not None and problem is None:
        return config
    if isinstance(problem, _Named):
        raise InputError(f"{where}{problem}")
    suspects = list(
        islice(
            (name for name, without in _each_left_out(values) if _attempt(without, make, network, section)[1] is None),
            3,
        )
    )
    named = (
        f"{where}{' or '.join(f'{name} = {_value_at(values, name)!r:.80}' for name in suspects)}"
        if suspects
        else where.rstrip(".: ")
    )
    raise InputError(
        f"{named}: no {network.__name__} can be made of it ({type(problem).__name__}: "
        f"{' '.join(str(problem).split())[:400]})"
    )


class _Named(Exception):
    """A problem that names its key already."""


def _attempt(
    values: dict[str, Any], make: Callable[[dict[str, Any]], Config], network: type[PreTrainedModel], section: str
) -> tuple[Config | None, Exception | None]:
    try:
        with quiet_transformers():
            config = make(copy.deepcopy(values))
            _check_numbers(config, section)
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                network._from_config(_one_block(config))
    except Exception as error:  # whatever transformers' code runs into with such values
        return None, error
    return config, None


def _sections(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _sections(value, f"{prefix}{name}.")


def _check_numbers(config: PreTrainedConfig, outer: str) -> None:
    """Raises _Named for a number out of its range, an unknown activation, heads that do not fit, and frequencies that
    follow the batch."""
    for prefix, section in _sections(config, outer):
        own = vars(section)  # without transformers' second names of the same numbers
        for name, allowed in RANGES.items():
            value = own.get(name)
            if not allowed.holds(value):
                raise _Named(f"{prefix}{name}: found {value!r:.80}, expected {allowed}")
        for name in ACTIVATIONS:
            value = own.get(name)
            if value is not None and value not in ACT2FN:
                raise _Named(f"{prefix}{name}: found {value!r:.80}; {nearest(str(value), ACT2FN)}")
        known = {entry.name for entry in fields(type(section))}
        for name, neutral in UNREAD.items():
            value = own.get(name)
            if (
                value is not None
                and value not in neutral
                and name not in known
                and not (name == "sliding_window" and own.get("use_sliding_window") is False)
            ):
                told = (
                    f"expected {' or '.join(map(repr, neutral)) or 'null'}: a "
                    f"{type(section).__name__.removesuffix('Config')} does not read it"
                )
                raise _Named(
                    f"{prefix}{name}: found {value!r:.80}, {told}, so the network would compute something else "
                    "than its weights were trained for"
                )
        _check_attention(prefix, own, known)
        heads, shared = getattr(section, "num_attention_heads", None), getattr(section, "num_key_value_heads", None)
        if heads is not None and shared is not None and heads % shared:
            raise _Named(
                f"{prefix}num_key_value_heads: {heads} attention heads cannot share {shared} key-value heads "
                "evenly; num_attention_heads must be "
                "a multiple of num_key_value_heads"
            )
        padding, vocabulary = getattr(section, "pad_token_id", None), getattr(section, "vocab_size", None)
        if isinstance(padding, int) and vocabulary is not None and not -vocabulary <= padding < vocabulary:
            raise _Named(f"{prefix}pad_token_id: found {padding}, expected an id below vocab_size = {vocabulary}")
        start = own.get("decoder_start_token_id")  # of a T5, which reads it first
        if start is not None and vocabulary is not None and not (type(start) is int and 0 <= start < vocabulary):
            raise _Named(
                f"{prefix}decoder_start_token_id: found {start!r:.80}, expected an id from 0 to below "
                f"vocab_size = {vocabulary}"
            )
        rope = getattr(section, "rope_parameters", None)
        if rope is not None and "rope_type" not in rope and any(isinstance(one, dict) for one in rope.values()):
            for kind, own_rope in rope.items():  # by the type of a block's attention
                _check_rotary(f"{prefix}rope_parameters.{kind}", section, own_rope)
        elif rope is not None:
            _check_rotary(f"{prefix}rope_parameters", section, rope)


def _check_attention(prefix: str, own: Mapping[str, Any], known: set[str]) -> None:
    """Raises _Named for attention that is not causal, or has windows where the network (settings `known`) has none."""
    kinds = ("full_attention", "sliding_attention") if "sliding_window" in known else ("full_attention",)
    if any(kind not in kinds for kind in own.get("layer_types") or ()):
        raise _Named(
            f"{prefix}layer_types: found {own['layer_types']!r:.80}, expected {' or '.join(kinds)} in every block"
        )
    if own.get("use_bidirectional_attention"):
        raise _Named(f"{prefix}use_bidirectional_attention: found true, expected false: tokens see those before them")


def _check_rotary(key: str, config: PreTrainedConfig, rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    constant = kind == "longrope" and rope.get("short_factor") == rope.get("long_factor") is not None
    if kind not in POSITION_ONLY and not constant:
        raise _Named(
            f"{key}.rope_type (rope_scaling): found '{kind}', which makes frequencies depend on the longest "
            "sequence of a batch, or is unknown; "
            f"expected one of {', '.join(POSITION_ONLY)}, whose frequencies depend on the position alone"
        )
    for name, allowed in (("rope_theta", _THETA), ("factor", _FACTOR), ("attention_factor", _FACTOR)):
        if not allowed.holds(rope.get(name)):
            raise _Named(f"{key}.{name}: found {rope.get(name)!r:.80}, expected {allowed}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = rope.get("partial_rotary_factor", 1.0)
    if isinstance(config, Phi3Config):  # the one of ours that rotates parts of heads
        width, partial = int(width * partial), 1.0
    if width % 2:
        raise _Named(f"{key}: heads of width {width} cannot be rotated in pairs; expected an even width")
    if partial != 1.0:
        raise _Named(
            f"{key}.partial_rotary_factor: found {partial!r:.80}, expected 1, since a "
            f"{type(config).__name__.removesuffix('Config')} rotates whole heads"
        )


def _one_block(config: Config) -> Config:
    small = copy.deepcopy(config)
    for _, section in _sections(small):
        for name in DEPTHS:
            if isinstance(getattr(section, name, None), int):
                setattr(section, name, 1)
    return small


def _each_left_out(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """By dotted key, inner ones first: the values without it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from (
                (inner, {**values, name: without}) for inner, without in _each_left_out(value, f"{prefix}{name}.")
            )
        yield f"{prefix}{name}", {other: kept for other, kept in values.items() if other != name}


def _value_at(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
