"""Vision towers of any family: made without memory, and cut into the units that are loaded at once."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from vltrain.models.backbones.table import tower_of
from vltrain.models.materialise import empty_model


def empty_tower(config: PreTrainedConfig, attention: str) -> Any:
    """`empty_model` of the config's family."""
    return empty_model(tower_of(config).network, config, attention)


def tower_units(network: Any) -> list[tuple[str, nn.Module]]:
    """Name and module of what is loaded at once, in the order of the forward; together all parameters."""
    tower = tower_of(network.config)
    blocks = [(f"encoder.layers.{number}", block) for number, block in enumerate(network.encoder.layers)]
    before, after = ([(name, getattr(network, name)) for name in names] for names in (tower.before, tower.after))
    return [*before, *blocks, *after]
