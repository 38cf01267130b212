"""Weights in the layout of Hugging Face, for an empty network of the sizes in their config.json.

transformers would fill a missing weight with random numbers and drop one it does not know, with a line in the log; here
a checkpoint that does not give the network exactly its weights is an `InputError` that names the file and the keys.
What is in a file beside them (second spellings of tied weights, buffers of older releases) is not skipped by its name,
but compared. Each unit is then read for itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.errors import InputError
from vltrain.models.materialise import fill_by_name
from vltrain.models.pretrained.quiet import some
from vltrain.models.pretrained.rotary import same_frequencies
from vltrain.models.pretrained.tensor_folder import TensorFolder

logger = logging.getLogger(__name__)

POSITION_IDS = re.compile(r"(.*\.)?position_ids")
ROTARY = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Beside:
    """What files may hold beside a network's parameters, by its names.

    unused: names of other networks in the same files, which this one has no use for.
    copies: second names of a parameter -> the first. They must hold the same numbers, or stand in where the first is
    not there.
    rotary: the rotary frequencies [d / 2] that the config means, as it may be saved: each of these is right.
    """

    unused: re.Pattern[str] = re.compile(r"(?!)")
    copies: Mapping[str, str] = field(default_factory=dict)
    rotary: tuple[Tensor, ...] = ()


class HuggingFaceWeights:
    """The weights of a folder or hub name.

    Args:
        key, source: the setting that names it (`model.llm`), and what it says, for errors.
        place: folder or hub name.
        ours: turns a name of the files into the network's.
        beside: what else may be there.

    Raises: InputError for files that are missing or broken, and for weights that are missing, unknown, of another
    shape, or
        that contradict each other or the config.
    """

    def __init__(
        self, key: str, source: str, place: str, network: PreTrainedModel, ours: Callable[[str], str], beside: Beside
    ) -> None:
        self.key, self.source, self.place = key, source, place
        self._folder = TensorFolder(key, source, place)
        self.files = self._folder.files
        self._theirs: dict[str, str] = {}  # our name -> theirs
        expected = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
        extra: dict[str, str] = {}
        wrong: dict[str, list[str]] = {
            "missing": [],
            "not of this model": [],
            "of another shape": [],
            "there twice": [],
        }
        for theirs in self._folder.heads:
            name = ours(theirs)
            if name in self._theirs or name in extra:
                wrong["there twice"].append(f"{theirs} beside {self._theirs.get(name) or extra[name]}")
            elif name in expected:
                self._theirs[name] = theirs
            elif name in beside.copies or POSITION_IDS.fullmatch(name) or ROTARY.fullmatch(name):
                extra[name] = theirs
            elif not beside.unused.match(theirs):
                wrong["not of this model"].append(f"{theirs}{self._where(theirs)}")
        for copy, first in beside.copies.items():
            if copy in extra and first in expected:
                self._theirs.setdefault(first, extra[copy])
        wrong["of another shape"] = [
            told for name, theirs in self._theirs.items() if (told := self._misfit(theirs, expected[name]))
        ]
        by_index = {ours(theirs): name for theirs, name in self._folder.promised.items()}
        missing = sorted(expected.keys() - self._theirs.keys())
        wrong["missing"] = [f"{name} ({by_index[name]})" if name in by_index else name for name in missing]
        self._refuse(wrong, type(network).__name__)
        for name, theirs in extra.items():
            if name in beside.copies:
                self._require_copy(theirs, self._theirs.get(beside.copies[name]))
            elif not beside.unused.match(theirs):
                self._require_buffer(theirs, None if POSITION_IDS.fullmatch(name) else beside.rotary)
        self._folder.close()

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        fill_by_name(name, unit, dtype, lambda ours, target: target.copy_(self._folder.read(self._theirs[ours])))
        self._folder.close()

    def _where(self, theirs: str) -> str:
        return f" ({self._folder.heads[theirs].path.name})" if len(self._folder.paths) > 1 else ""

    def _misfit(self, theirs: str, expected: list[int]) -> str | None:
        head = self._folder.heads[theirs]
        if head.shape == expected and head.is_float:
            return None
        found = head.shape if head.is_float else f"{head.shape} of {head.dtype}, which are no floats"
        return f"{theirs} {found}, expected {expected}{self._where(theirs)}"

    def _refuse(self, wrong: dict[str, list[str]], network: str) -> None:
        if any(wrong.values()):
            told = "; ".join(
                f"{len(names)} {problem}: {some(sorted(names))}" for problem, names in wrong.items() if names
            )
            raise InputError(
                f"{self.key}.source: the weights of '{self.source}' ({self.place}) do not fit a {network} of "
                f"its config.json. Weights {told}"
            )

    def _require_copy(self, theirs: str, first: str | None) -> None:
        if first is None or not (theirs == first or self._folder.equal(theirs, first)):
            raise InputError(
                f"{self.key}.source: {self.place}: {theirs} differs from {first}, but config.json ties them; fix "
                "the config "
                "(tie_word_embeddings) or the file"
            )

    def _require_buffer(self, theirs: str, rotary: tuple[Tensor, ...] | None) -> None:
        """Positions count from 0; rotary frequencies are those of the config."""
        found = self._folder.read(theirs).flatten()
        if rotary is None:
            fits = torch.equal(found, torch.arange(len(found), dtype=found.dtype))
            due = "0, 1, 2, ..."
        else:
            fits = any(same_frequencies(found, one) for one in rotary)
            due = "those of its rope_theta and scaling"
        if not fits:
            raise InputError(
                f"{self.key}.source: {self.place}: {theirs} is "
                f"{some([f'{value:g}' for value in found.tolist()])}, but config.json means {due}, and that is what "
                "would be used; fix the config, or take the file's buffer out"
            )


def has_own_head(key: str, source: str, place: str, head: str, tables: tuple[str, ...]) -> bool:
    """Whether the files hold a head that differs from the table of embeddings. False where they are not on this
    machine.

    Args:
        head, tables: the head's name in the files, and the names that the table may have.
    """
    try:
        folder = TensorFolder(key, source, place, fetch=False)
    except InputError:
        return False  # said where weights are opened
    table = next((name for name in tables if name in folder.heads), None)
    if table is None or head not in folder.heads:
        return False
    known = (folder.identity, head)
    if known not in _OWN_HEADS:
        _OWN_HEADS[known] = not folder.equal(head, table)
        if _OWN_HEADS[known]:
            logger.warning(
                "%s.source: %s: config.json says tie_word_embeddings, but the file's %s differs from %s; the "
                    "file's head is used, as transformers does",
                key, place, head, table,
            )  # fmt: skip
    return _OWN_HEADS[known]


_OWN_HEADS: dict[
    tuple[object, str], bool
] = {}  # by files and head: tables are large, and asked about for every network that is built
