"""Weights of a vision-language model of transformers: of a folder or hub name, or random ones; filled unit by unit.

Names change from release to release of transformers, and with them layouts (experts in one matrix, a patch convolution
as a linear layer). What its own loader renames and converts, it does here as well (`get_model_conversion_mapping`); but
a checkpoint that does not give the network exactly its weights is an `InputError`, as for other architectures
(`vltrain.models.pretrained.hugging_face`).
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.config.model.stock import StockConfig
from vltrain.errors import InputError
from vltrain.models.materialise import Weights, fill_by_name, materialise
from vltrain.models.pretrained.hugging_face import POSITION_IDS, ROTARY
from vltrain.models.pretrained.quiet import some
from vltrain.models.pretrained.tensor_folder import TensorFolder
from vltrain.models.random import seeded
from vltrain.models.stock.source import KEY, stock_place

SAFE = ".safetensors"


class StockWeights(Weights, Protocol):
    """Weights that know buffers, too."""

    def fill_buffers(self, network: PreTrainedModel) -> None:
        """Gives the buffers that checkpoints hold their values."""
        ...


def open_stock(model: StockConfig, network: PreTrainedModel) -> StockWeights:
    """The weights of `source`, or random ones, for an empty network of its config.

    Raises: InputError for a file that is missing, broken or not safetensors, and for weights that are missing, unknown
    or of another shape.
    """
    if model.stock.source is None:
        return RandomStockWeights(network, model.seed)
    return FolderWeights(model.stock.source, stock_place(model.stock), network)


class RandomStockWeights:
    """transformers' own initialisation, each unit's numbers drawn by themselves from seed and name."""

    def __init__(self, network: PreTrainedModel, seed: int) -> None:
        self._network, self._seed = network, seed
        self._std = float(getattr(network.config.get_text_config(), "initializer_range", None) or 0.02)
        self.files: dict[str, Path] = {}

    @torch.no_grad()
    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        made = [inner for inner, parameter in unit.named_parameters() if parameter.is_meta]
        if not made:
            return
        with seeded(self._seed, f"stock/{name}"):
            for inner in made:  # what transformers' own initialisation leaves alone must not be undefined
                nn.init.normal_(materialise(unit, inner, torch.float32), std=self._std)
            owners = {module for module in unit.modules() if any(map(made.__contains__, _own_names(unit, module)))}
            for module in unit.modules():
                if module in owners:
                    self._owner(name)._init_weights(module)
        for inner in made:
            parameter = unit.get_parameter(inner)
            parameter.data = parameter.data.to(dtype)

    def fill_buffers(self, network: PreTrainedModel) -> None:
        """Random networks keep those that their constructors made."""

    def _owner(self, name: str) -> Any:
        """The innermost model of transformers' that a unit is of, whose initialisation it has."""
        words = name.split(".")
        around = [self._network.get_submodule(".".join(words[:count])) for count in range(len(words) + 1)]
        return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def _own_names(unit: nn.Module, module: nn.Module) -> list[str]:
    """Full names, within the unit, of the parameters that a module below it holds itself."""
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in unit.named_parameters() if id(parameter) in own]


class FolderWeights:
    """The weights of a folder or hub name; see `open_stock`."""

    def __init__(self, source: str, place: str, network: PreTrainedModel) -> None:
        self._source, self._place, self._network = source, place, network
        self._folder = TensorFolder(KEY, source, place)
        self.files = self._folder.files
        unsafe = [path.name for path in self._folder.paths if path.suffix != SAFE]
        if unsafe:
            raise InputError(
                f"{KEY}.source: '{source}' ({place}) has its weights in {some(unsafe)}, expected safetensors"
            )
        self._sources: dict[str, list[tuple[str, str]]] = {}  # target -> (pattern, name in the files)
        self._converters: dict[str, Any] = {}  # target -> what makes it and others of several sources
        self._made_by: dict[str, str] = {}  # target of a converter -> its first target
        self._cache: dict[str, Tensor] = {}
        self._map_names()
        self._folder.close()

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        fill_by_name(name, unit, dtype, self._write)
        self._cache.clear()
        self._folder.close()

    @torch.no_grad()
    def fill_buffers(self, network: PreTrainedModel) -> None:
        for name, buffer in network.named_buffers():
            if name in self._sources:
                buffer.copy_(self._folder.read(self._sources[name][0][1]))
        self._folder.close()

    def _write(self, name: str, target: Tensor) -> None:
        first = self._made_by.get(name)
        if first is None:
            target.copy_(self._folder.read(self._sources[name][0][1]))
            return
        if name not in self._cache:
            self._cache.update(self._converted(first))
        found = self._cache.pop(name)
        if found.shape != target.shape:
            raise InputError(
                f"{KEY}.source: '{self._source}' ({self._place}): {name} becomes {list(found.shape)}, expected "
                f"{list(target.shape)}"
            )
        target.copy_(found)

    def _converted(self, first: str) -> dict[str, Tensor]:
        """All targets of the converter whose first one is `first`."""
        converter = copy.deepcopy(self._converters[first])
        for pattern, name in self._sources[first]:
            converter.add_tensor(first, name, pattern, self._folder.read(name))
        made = converter.convert(first, model=self._network, config=self._network.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def _map_names(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        network = self._network
        expected = network.state_dict()
        transforms = get_model_conversion_mapping(network)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        unknown: list[str] = []
        for name in sorted(self._folder.heads, key=dot_natural_key):
            ours, pattern = rename_source_key(name, renamings, converters, network.base_model_prefix, expected)
            if ours not in expected and name in expected:
                ours, pattern = name, None
            if ours not in expected:
                unknown.append(name)
                continue
            self._sources.setdefault(ours, []).append((pattern or name, name))
            if pattern is not None and ours not in self._converters:
                converter = self._converters[ours] = by_pattern[pattern]
                first, *others = converter.target_patterns
                for target in (ours, *(ours.replace(first, other) for other in others)):
                    self._made_by[target] = ours
        self._check(expected, unknown)

    def _check(self, expected: dict[str, Tensor], unknown: list[str]) -> None:
        """Raises InputError unless the files hold exactly what the network needs."""
        network = self._network
        parameters = dict(network.named_parameters(remove_duplicate=False))
        names: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            names.setdefault(id(parameter), []).append(name)
        found = self._sources.keys() | self._made_by.keys()
        for first, *others in names.values():
            here = [name for name in (first, *others) if name in found]
            if here and first not in found:
                self._sources[first] = self._sources[here[0]]
            for other in here[1:] if first in found else ():
                if not self._folder.equal(self._sources[first][0][1], self._sources[other][0][1]):
                    raise InputError(
                        f"{KEY}.source: {self._place}: {other} differs from {first}, but config.json ties them; fix "
                        "the config (tie_word_embeddings) or the file"
                    )
        found = self._sources.keys() | self._made_by.keys()
        missing = sorted(first for first, *_ in names.values() if first not in found)
        twice = [name for name, sources in self._sources.items() if len(sources) > 1 and name not in self._converters]
        ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
        strange = [
            name
            for name in unknown
            if not (POSITION_IDS.fullmatch(name) or ROTARY.fullmatch(name))
            and not any(re.search(pattern, name) for pattern in ignored)
        ]
        misshapen = [
            f"{sources[0][1]} {head.shape}, expected {list(expected[name].shape)}"
            for name, sources in self._sources.items() if name not in self._made_by
            for head in (self._folder.heads[sources[0][1]],)
            if head.shape != list(expected[name].shape) or (name in parameters and not head.is_float)
        ]  # fmt: skip
        wrong = {
            "missing": missing,
            "not of this model": strange,
            "of another shape": misshapen,
            "there twice": twice,
        }
        if any(wrong.values()):
            told = "; ".join(f"{len(one)} {problem}: {some(sorted(one))}" for problem, one in wrong.items() if one)
            raise InputError(
                f"{KEY}.source: the weights of '{self._source}' ({self._place}) do not fit a "
                f"{type(network).__name__} of its config.json. Weights {told}"
            )
