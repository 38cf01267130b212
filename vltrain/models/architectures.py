"""The table of architectures: the name in a recipe -> `Architecture`.

It has no lines of its own: the section of each name (`vltrain.config.model.architectures`) says which folder its
network is in, and that folder's module `architecture` has it as ARCHITECTURE. A folder is imported when a recipe asks
for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from vltrain.config.model.architectures import ARCHITECTURES
from vltrain.config.model.base import ModelConfig
from vltrain.models.interface import Architecture


def architecture_of(model: ModelConfig | type[ModelConfig]) -> Architecture:
    """The architecture that a section is of."""
    found = importlib.import_module(f"{model.FOLDER}.architecture").ARCHITECTURE
    assert isinstance(found, Architecture), f"{model.FOLDER}.architecture.ARCHITECTURE is {found!r}"
    return found


def all_architectures() -> Iterator[tuple[str, Architecture]]:
    """Every name, and its architecture."""
    for name, section in ARCHITECTURES.items():
        yield name, architecture_of(section)
