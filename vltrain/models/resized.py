"""A recipe's settings for a small copy of its networks: what `Architecture.resized` of all have in common."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from vltrain.config.model.mmt import AdapterConfig
from vltrain.models.adapters.table import adapter_kind
from vltrain.models.quantise import QUANTISED_BITS

RANK, WIDTH = 4, 4
SIDE = 64
"""Of the networks of a small copy: all their widths are multiples of it."""
Updates = TypeVar("Updates", bound=Any)


def resized_adapter(adapter: AdapterConfig) -> AdapterConfig:
    """Adapters that small layers hold, of the same kinds in the same places, without dropout; their groups divide a
    small width, whatever divides the model's own."""
    known = adapter_kind(adapter, "llm").settings | adapter_kind(adapter, "vision").settings
    groups = {name: math.gcd(getattr(adapter, name), SIDE) for name in ("groups", "down_groups")}
    adapter = replace(adapter, **groups)
    small = {"dim": WIDTH * adapter.groups * adapter.down_groups, "rank": RANK}  # others have no effect
    fitting = {name: min(getattr(adapter, name), most) for name, most in small.items() if name in known}
    return replace(adapter, **fitting, dropout=0.0, impl="auto")


def resized_updates(updates: Updates) -> Updates:
    """Low-rank updates of a small rank, without dropout. `updates`: a section with `rank` and `dropout`."""
    return replace(updates, rank=min(updates.rank, RANK), dropout=0.0)


def packed_bits(bits: int | None) -> int | None:
    """4 and 8, which change what is computed; a small copy is in fp32 whatever else a recipe's frozen weights are
    kept in."""
    return bits if bits in QUANTISED_BITS else None


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as a recipe says it: the fields of its own class, and its type."""
    said = config.to_dict()
    return {"model_type": config.model_type} | {
        entry.name: said[entry.name]
        for entry in fields(type(config))
        if entry.name in said and said[entry.name] is not None
    }
