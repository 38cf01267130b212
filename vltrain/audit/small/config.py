"""A small copy of a model's own config: fewer layers, narrower, a smaller vocabulary; every mechanism stays.

One layer of each kind (`vltrain.audit.small.depth`), small widths by their names (`vltrain.audit.small.sizes`),
special tokens in their order at the vocabulary's end, windows shorter than the audit's segments, no dropout. Ratios
that are mechanisms stay: grouped keys, heads that do not sum to the width, the share of a head that rotates, sections
of positions, patches that a visual token is made of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

from vltrain.audit.small.depth import LEAST, shrink_depth
from vltrain.audit.small.image_sizes import feature_layers, shrink_pictures
from vltrain.audit.small.sizes import (
    EXPERT,
    EXPERT_FEEDS,
    FEED,
    FEEDS,
    FIXED,
    HIDDEN,
    HIDDEN_NAMES,
    NO_CHANCE,
    SIDE,
    TOKENS,
    VOCABULARY,
    WIDTHS,
    hidden_of,
    shrink_experts,
    shrink_heads,
    shrink_mixers,
    shrink_rotary,
)

IMAGES = ("vision", "image", "vit", "visual", "high_res", "low_res", "perception", "qformer", "perceiver", "projector")
STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
SPREAD = 0.1  # of random weights, at most: a wide net of larger ones amplifies rounding beyond what is to be seen
OTHERS = ("audio", "vq_", "speech", "dit_", "expert")


@dataclass(frozen=True, kw_only=True)
class Small:
    """The small config, and which token of its vocabulary each special token of the config became."""

    config: PreTrainedConfig
    tokens: dict[int, int]


def shrink(config: PreTrainedConfig, *, keep_pictures: bool = False) -> Small:
    """A small copy of `config`, which stays as it is.

    Args:
        keep_pictures: leaves sizes of images, patches and what patches are pooled by, for a processor that was made
            for them.
    """
    values = config.to_dict()
    text = _text_of(values)
    widths = {hidden: HIDDEN for hidden in [hidden_of(text)] if hidden}
    tokens = _small_tokens(values)
    layers = feature_layers(values)
    small = _shrink_level(values, "", widths, tokens, layers.depth if layers else LEAST)
    if layers:
        small |= layers.new
    if not keep_pictures:
        shrink_pictures(small)
    small.pop("transformers_version", None)
    for name in STAGES:  # of a backbone, by its depth: its class counts them anew
        small.pop(name, None)
    made = type(config).from_dict(copy.deepcopy(small))
    made.architectures = config.architectures
    return Small(config=made, tokens=tokens)


def _text_of(values: dict[str, Any]) -> dict[str, Any]:
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(values.get(name), dict):
            return _text_of(values[name])
    return values


def _small_tokens(values: dict[str, Any]) -> dict[int, int]:
    """Every token id that the config names -> one at the small vocabulary's end, their order kept."""
    named = sorted({token for token in _named_tokens(values) if token >= 0})
    return {token: VOCABULARY - len(named) + place for place, token in enumerate(named)}


def _named_tokens(values: dict[str, Any]) -> Iterator[Any]:
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("id2label", "label2id", "per_layer_config"):
            yield from _named_tokens(value)
        elif _names_tokens(name):
            yield from (one for one in (value if isinstance(value, list) else [value]) if _is_number(one))


def _names_tokens(name: str) -> bool:
    return bool(TOKENS.match(name)) and not name.endswith(("expert_index", "layer_index", "layer_ids", "_idx_id"))


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink_level(
    values: dict[str, Any], name: str, widths: dict[int, int], tokens: dict[int, int], vision_depth: int
) -> dict[str, Any]:
    """One config of a tree, with those inside it. `widths`: of the networks around it, original -> small."""
    is_text = not any(word in name for word in (*IMAGES, *OTHERS))
    hidden = hidden_of(values)
    own = HIDDEN if is_text else SIDE
    known = {**widths, **({hidden: own} if hidden else {})}
    new: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("dtype", "torch_dtype"):
            new[key] = "float32"
        elif _is_config(key, value):
            inner = widths if is_text else known
            new[key] = _shrink_level(value, key, inner, tokens, vision_depth)
        else:
            new[key] = _shrink_value(key, value, own, known, tokens)
    if "embed_dim" in values and not is_text and "hidden_size" in values:
        new["hidden_size"] = HIDDEN  # Qwen2-VL's tower: its own width is the other, and this the language model's
    new |= shrink_depth(values | {key: one for key, one in new.items() if isinstance(one, list)},
                        vision_depth if "vision" in name else LEAST)  # fmt: skip
    new |= shrink_heads(values, text=is_text) | shrink_experts(values) | shrink_mixers(values, own)
    _shrink_own_of_layers(values, new)
    entries = new.get("head_dim") or own // max(1, next((new[one] for one in ("num_attention_heads", "n_head",
                                                     "num_heads") if isinstance(new.get(one), int)), 1))  # fmt: skip
    if isinstance(new.get("qk_rope_head_dim"), int):
        entries = new["qk_rope_head_dim"]
    for key in ("rope_parameters", "rope_scaling"):
        if key in new:
            new[key] = shrink_rotary(new[key], entries, values.get("partial_rotary_factor"))
    return new


def _is_config(key: str, value: Any) -> bool:
    named = isinstance(value, dict) and ("model_type" in value or key.endswith("_config"))
    return named and key != "per_layer_config"


def _shrink_value(key: str, value: Any, own: int, known: dict[int, int], tokens: dict[int, int]) -> Any:
    if _names_tokens(key) and (_is_number(value) or isinstance(value, list)):
        many = value if isinstance(value, list) else [value]
        mapped = [tokens.get(one, one) if _is_number(one) else one for one in many]
        return mapped if isinstance(value, list) else mapped[0]
    if key.endswith("initializer_range") and isinstance(value, float):
        return min(value, SPREAD)
    if NO_CHANCE.match(key) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value)(0)
    if isinstance(value, list) and value and all(_is_number(one) for one in value) and FEEDS.match(key):
        return [FEED] * len(value)
    if not _is_number(value):
        return value
    if key in FIXED:
        return FIXED[key]
    if key == "vocab_size" or ("vocab_size" in key and value > VOCABULARY):
        return VOCABULARY
    if key == "out_hidden_size":
        return HIDDEN  # a tower's, into the language model
    if key in HIDDEN_NAMES:
        return own
    if EXPERT_FEEDS.match(key):
        return EXPERT
    if FEEDS.match(key):
        return FEED
    if WIDTHS.match(key):
        return known.get(value, SIDE)
    return value


def _shrink_own_of_layers(values: dict[str, Any], new: dict[str, Any]) -> None:
    """`per_layer_config`: sizes of single layers, kept at their ratio to the others'."""
    for own in (new.get("per_layer_config") or {}).values():
        for name, value in list(own.items()):
            if _is_number(value) and _is_number(values.get(name)) and _is_number(new.get(name)) and values[name]:
                own[name] = max(1, new[name] * value // values[name])
