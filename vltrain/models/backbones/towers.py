"""Vision towers of any family: made without memory, and cut into the units that are loaded at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from vltrain.models.backbones.table import tower_of
from vltrain.models.materialise import empty_model


def empty_tower(config: PreTrainedConfig, attention: str) -> Any:
    """`empty_model` of the config's family."""
    return empty_model(tower_of(config).network, config, attention)


def tower_blocks(network: Any) -> list[nn.Module]:
    """The transformer blocks, first to last."""
    return list(network.get_submodule(tower_of(network.config).layers))


def tower_units(network: Any) -> list[tuple[str, nn.Module]]:
    """Name and module of what is loaded at once, in the order of the forward; together all parameters."""
    tower = tower_of(network.config)
    blocks = [(f"{tower.layers}.{number}", block) for number, block in enumerate(tower_blocks(network))]
    before, after = (
        [(name, getattr(network, name)) for name in names if hasattr(network, name)]
        for names in (tower.before, tower.after)
    )
    return [*before, *blocks, *after]


def first_states(network: Any, pixels: Tensor) -> Tensor:
    """What the first block reads of normalised pixels fp32 [N, 3, H, W]: [N, P, d]."""
    tower = tower_of(network.config)
    if tower.embed is not None:
        return tower.embed(network, pixels)
    states = pixels
    for name in tower.before:
        states = getattr(network, name)(states)
    return states
