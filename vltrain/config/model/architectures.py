"""The architectures that a recipe can name: `model.architecture` -> the class of its section.

A new one is a folder (`ModelConfig.FOLDER`), the class of its settings, and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vltrain.config.model.base import ModelConfig
from vltrain.config.model.instructblip import BlipModelConfig
from vltrain.config.model.mmt import MmtConfig
from vltrain.config.model.stock import StockConfig

ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "mmt": MmtConfig,
    "instructblip": BlipModelConfig,
    "stock": StockConfig,
}
KEY, DEFAULT = "model.architecture", "mmt"


def section_of(given: Mapping[str, Any]) -> type[ModelConfig]:
    """The section that the settings `given` (dotted key -> checked value) are of."""
    return ARCHITECTURES[given.get(KEY, DEFAULT)]


def keys_of_all(name: str) -> tuple[str, ...]:
    """The dotted keys of every architecture's `PATHS` or `FROZEN`."""
    listed = (f"model.{key}" for section in ARCHITECTURES.values() for key in getattr(section, name))
    return tuple(dict.fromkeys(listed))
