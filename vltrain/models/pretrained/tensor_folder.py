"""The named tensors of a folder or hub name: safetensors or torch files, one or several with an index.

Of several that could be meant, transformers' order decides (`FILES`): what it reads, we read, and the rest is named in
the log, since a folder that was saved into twice keeps what the first save left. Names and shapes are read off the
files' heads; a tensor costs memory only while it is read.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import LOAD_ERRORS, cannot_load, find_file, read_settings, some
from vltrain.models.pretrained.tensor_files import open_tensors

logger = logging.getLogger(__name__)

# What a folder may hold, the first that is there counts: transformers' order.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"
READ_BESIDE = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
)  # what also says what the network computes
FLOATS = {"F64", "F32", "F16", "BF16"}  # of a safetensors head
_ROWS_AT_ONCE = 4096  # of tables that are compared


@dataclass(frozen=True)
class Head:
    """What a file says of a tensor before it is read. `dtype`: in the file's own words."""

    path: Path
    shape: list[int]
    dtype: str
    is_float: bool


class TensorFolder:
    """The tensors of the files that count.

    Args:
        key, source: the setting that names it (`model.llm`), and what it says, for errors.
        place: folder or hub name.
        fetch: download what is not on this machine.

    Attributes:
        heads: by name in the files.
        promised: by name, the file that the index says it is in; empty without an index.

    Raises: InputError for files that are missing or broken, and for a tensor that two of them hold.
    """

    def __init__(self, key: str, source: str, place: str, *, fetch: bool = True) -> None:
        self.key, self.source, self.place, self._fetch = key, source, place, fetch
        self._open: dict[Path, Callable[[str], Tensor]] = {}
        self.paths, self.promised = self._find()
        self.heads: dict[str, Head] = {}
        for path in self.paths:
            for name, head in self._heads_of(path).items():
                if name in self.heads:
                    self._fail(
                        ValueError(
                            f"{name} is in {self.heads[name].path.name} and in {path.name}, and only one can be meant"
                        )
                    )
                self.heads[name] = head

    @property
    def files(self) -> dict[str, Path]:
        """What is read for the network, its sizes and its images included, by its name in the folder."""
        is_folder = Path(self.place).is_dir()
        beside = [
            path for name in READ_BESIDE if (path := self._path(name) if name == READ_BESIDE[0] or is_folder else None)
        ]
        return {os.path.relpath(path, self.place) if is_folder else path.name: path for path in (*beside, *self.paths)}

    @property
    def identity(self) -> tuple[tuple[str, int, int], ...]:
        """What changes when a file does: its path, size and time."""
        stats = ((path, path.stat()) for path in self.paths)
        return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)

    def read(self, name: str) -> Tensor:
        """The tensor of that name. Files stay open until `close`."""
        path = self.heads[name].path
        if path not in self._open:
            self._open[path] = (
                self._tensors(path).__getitem__
                if path.suffix != ".safetensors"
                else safe_open(path, framework="pt").get_tensor
            )
        return self._open[path](name)

    def close(self) -> None:
        """Lets go of the files, and with them of what was mapped."""
        self._open.clear()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        try:
            first, second = self.read(one), self.read(other)
            if first.shape != second.shape:
                return False
            pairs = zip(first.split(_ROWS_AT_ONCE), second.split(_ROWS_AT_ONCE)) if first.ndim else ((first, second),)
            return all(
                torch.equal(ours, theirs.to(ours.dtype)) and torch.equal(ours.to(theirs.dtype), theirs)
                for ours, theirs in pairs
            )
        finally:
            self.close()

    def _find(self) -> tuple[list[Path], dict[str, str]]:
        """The files with weights, and by the index (if there is one) each weight's file."""
        is_folder = Path(self.place).is_dir()
        if is_folder and Path(self.place, "adapter_config.json").is_file():
            self._fail(
                ValueError(
                    "adapter_config.json lies beside them, which transformers would apply to what it names as "
                    "its base; merge or move it"
                )
            )
        for place, name in enumerate(FILES):
            path = self._path(name)
            if path is None:
                continue
            left = [other for other in FILES[place + 1 :] if is_folder and Path(self.place, other).is_file()]
            if left:
                _say_once(
                    f"{self.key}.source: {self.place}: {name} is read, as transformers does; not read, though "
                    f"there: {', '.join(left)}"
                )
            if not name.endswith(INDEX):
                return [path], {}
            return self._by_index(path)
        self._fail(
            FileNotFoundError(
                f"no {' or '.join(name for name in FILES if not name.endswith(INDEX))} there, whole or with an index"
            )
        )
        return None

    def _by_index(self, index: Path) -> tuple[list[Path], dict[str, str]]:
        promised = read_settings(self.key, self.source, index).get("weight_map")
        if (
            not isinstance(promised, dict)
            or not promised
            or not all(isinstance(file, str) for file in promised.values())
        ):
            raise InputError(
                f"{self.key}.source: {index}: weight_map: expected names of weights with the names of their files"
            )
        names = sorted(set(promised.values()))
        strange = [name for name in names if Path(name).name != name]
        if strange:
            raise InputError(f"{self.key}.source: {index}: weight_map names {some(strange)}, expected files beside it")
        paths = {file: self._path(file) for file in names}
        absent = [file for file, path in paths.items() if path is None]
        if absent:
            self._fail(FileNotFoundError(f"{index.name} names {some(absent)}, which is not there"))
        return [path for path in paths.values() if path is not None], promised

    def _path(self, name: str) -> Path | None:
        return find_file(self.key, self.source, self.place, name, fetch=self._fetch)

    def _heads_of(self, path: Path) -> dict[str, Head]:
        if path.suffix != ".safetensors":
            found = self._tensors(path).items()
            return {
                name: Head(path, list(tensor.shape), str(tensor.dtype), tensor.is_floating_point())
                for name, tensor in found
            }
        try:
            with safe_open(path, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not iterable)
                return {
                    name: Head(path, one.get_shape(), one.get_dtype(), one.get_dtype() in FLOATS)
                    for name, one in slices.items()
                }
        except LOAD_ERRORS as error:
            raise cannot_load(self.key, self.source, self.place, error) from None

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        try:
            return open_tensors(self.key, path)
        except InputError as error:
            raise InputError(
                f"{self.key}.source: cannot load '{self.source}': {str(error).removeprefix(f'{self.key}.source: ')}"
            ) from None

    def _fail(self, error: Exception) -> NoReturn:
        raise cannot_load(self.key, self.source, self.place, error)


@functools.cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)
