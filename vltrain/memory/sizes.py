"""Sizes of published networks, for planning with weights that are not on this machine.

What is on this machine is read; else a source's name (`weights/llama-2-7b`, `meta-llama/Llama-2-7b-hf`,
`diht_vitl14_336px.ckpt`) or the name that the user gives tells which network is meant. Nothing is downloaded. The table
holds assumptions, so what is taken from it is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from operator import attrgetter

from huggingface_hub import try_to_load_from_cache

from vltrain.config.model.base import ModelConfig
from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.models.architectures import all_architectures, architecture_of
from vltrain.models.backbones.family import Network
from vltrain.models.interface import PublishedSizes

# A folder with one of these says its network's sizes; a tokenizer beside them does not.
SAYS_SIZES = ("config.json", "consolidated.00.pth")


def assume_sizes(model: ModelConfig, **named: str | None) -> tuple[ModelConfig, list[str]]:
    """A recipe's model with sizes in the place of weights that are not here, to build an outline from; and, in words,
    what was assumed.

    Args:
        named: names to plan with, whatever the recipe names: `llm="llama-2-7b"` is what `--llm-size` says, see
            `PublishedSizes`.

    Raises: InputError for weights that are neither here nor known by their name, for unknown names, and for those of
    another architecture.
    """
    sizes = architecture_of(model).sizes
    for name, size in named.items():
        if size is not None and name not in {one.name for one in sizes}:
            raise InputError(f"--{name}-size: has no effect on the architecture {model.architecture}; leave it out")
    assumed = []
    for one in sizes:
        source, asked = attrgetter(one.key.removeprefix("model."))(model), named.get(one.name)
        name = _choose(one.key, source, one.networks, asked, f"--{one.name}-size")
        if name is not None:
            assumed.append(_told(one.key, source, asked, name))
            model = one.assume(model, name)
    return model, assumed


def size_options() -> dict[str, PublishedSizes]:
    """`--NAME-size` of all architectures, by NAME."""
    return {one.name: one for _, architecture in all_architectures() for one in architecture.sizes}


def _choose(key: str, source: str | None, table: Mapping[str, Network], named: str | None, option: str) -> str | None:
    """Which network of the table to assume; None where the sizes can be read."""
    if named is not None:
        if named not in table:
            raise InputError(f"{option}: unknown size '{named}', {nearest(named, table)}")
        return named
    if source is None or is_here(source):
        return None
    plain = _letters_and_digits(source)
    found = [(len(alias), name) for name, network in table.items() for alias in network.aliases if alias in plain]
    if not found:
        raise InputError(
            f"{key}: '{source}' is not on this machine, and not the name of a network of known sizes; choose one of "
            f"{', '.join(table)} by {option}, or fetch its config"
        )
    return max(found)[1]


def is_here(source: str, files: tuple[str, ...] = SAYS_SIZES) -> bool:
    """Whether what a source names can be read without fetching anything: a file, or a folder with one of `files`."""
    try:
        path = locate(source)
    except InputError:
        return False
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in files)
    return os.path.isfile(path) or any(isinstance(try_to_load_from_cache(path, name), str) for name in files)


def _letters_and_digits(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _told(key: str, source: str | None, named: str | None, name: str) -> str:
    reason = "as asked for" if named else "by its name, since it is not on this machine"
    return f"{key} ({source or 'random weights'}): sizes of {name}, {reason}"
