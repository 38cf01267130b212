"""Which layers of a network a small copy keeps: one of each kind, in their order, whatever makes them differ."""

from __future__ import annotations

import json
import re
from typing import Any

from vltrain.audit.small.sizes import DEPTH_NAMES

LEAST, MOST = 2, 8
PERIODS = ("attn_layer_period", "expert_layer_period", "decoder_sparse_step", "interleave_moe_layer_step",
           "moe_layer_interval", "full_attention_interval", "cross_layer_interval", "moe_layer_freq",
           "cross_attention_frequency")  # fmt: skip
INDICES = re.compile(r".*(index|indexes|indices|idxs|_layers|_layer_ids|moe_layers)$")


def layers_of(values: dict[str, Any]) -> int | None:
    """How many layers a level of a config says it has."""
    for name in DEPTH_NAMES:
        if isinstance(values.get(name), int):
            return values[name]
    blocks = values.get("layers_block_type")
    return len(blocks) if isinstance(blocks, list) else None


def by_layer(values: dict[str, Any], depth: int) -> dict[str, list[Any]]:
    """The lists that say something of each layer."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, list)
        and len(value) == depth > 1
        and not (INDICES.match(name) and _increases(value, depth))
    }


def by_index(values: dict[str, Any], depth: int) -> dict[str, list[int]]:
    """The lists that name layers."""
    return {
        name: value
        for name, value in values.items()
        if INDICES.match(name) and isinstance(value, list) and value and _increases(value, depth)
    }


def _increases(value: list[Any], depth: int) -> bool:
    numbers = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < depth for one in value)
    return numbers and all(first < second for first, second in zip(value, value[1:], strict=False))


def shrink_depth(values: dict[str, Any], least: int = LEAST) -> dict[str, Any]:
    """What of a level changes if it keeps one layer of each kind, and `least` at least."""
    depth = layers_of(values)
    if depth is None:
        return {}
    lists, indices = by_layer(values, depth), by_index(values, depth)
    chosen = _choose(values, depth, lists, indices, least)
    new: dict[str, Any] = {name: len(chosen) for name in DEPTH_NAMES if isinstance(values.get(name), int)}
    new |= {name: [value[layer] for layer in chosen] for name, value in lists.items()}
    for name, value in indices.items():
        new[name] = [place for place, layer in enumerate(chosen) if layer in value]
    if isinstance(values.get("per_layer_config"), dict):
        of = {int(layer): one for layer, one in values["per_layer_config"].items()}
        new["per_layer_config"] = {str(place): of[layer] for place, layer in enumerate(chosen) if layer in of}
    dense, shared = values.get("first_k_dense_replace"), values.get("num_kv_shared_layers")
    if isinstance(dense, int):
        new["first_k_dense_replace"] = sum(layer < dense for layer in chosen)
    if isinstance(shared, int):
        new["num_kv_shared_layers"] = sum(layer >= depth - shared for layer in chosen)
    if isinstance(values.get("max_window_layers"), int):
        new["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in chosen)
    return new


def _choose(
    values: dict[str, Any], depth: int, lists: dict[str, list[Any]], indices: dict[str, list[int]], least: int
) -> list[int]:
    dense, shared = values.get("first_k_dense_replace") or 0, values.get("num_kv_shared_layers") or 0
    own = {int(layer): one for layer, one in (values.get("per_layer_config") or {}).items()}

    def kind(layer: int) -> str:
        said: list[Any] = [value[layer] for name, value in lists.items()]
        said += [layer in value for value in indices.values()]
        return json.dumps([said, layer < dense, layer >= depth - shared, own.get(layer)], sort_keys=True, default=str)

    periods = [values[name] for name in PERIODS if isinstance(values.get(name), int)]
    block = values.get("block_types")
    period = max([*periods, len(block) if isinstance(block, list) else 0, 0])
    if not (lists or indices) and period > 1:
        return list(range(min(depth, max(period, least), MOST)))
    chosen: list[int] = []
    kinds: set[str] = set()
    for layer in range(depth):
        if (one := kind(layer)) not in kinds and len(chosen) < MOST:
            kinds.add(one)
            chosen.append(layer)
    if period > 1:  # what the lists leave to a count of layers
        chosen += [layer for layer in range(min(period, depth, MOST)) if layer not in chosen]
    for layer in range(depth):
        if len(chosen) >= min(least, depth):
            break
        if layer not in chosen:
            chosen.append(layer)
    return sorted(chosen)
