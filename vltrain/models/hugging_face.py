"""Weights in the layout of Hugging Face: a folder or a hub name, safetensors or torch files, one or several with an index; and GGUF.

Names and shapes are read off the files' heads when a source is opened, so that what does not fit is told before anything is
loaded. transformers would fill a missing weight with random numbers and drop one it does not know, with a line in the log;
here a checkpoint that does not give the network exactly its weights is an `InputError` that names the file and the keys. Each
unit is then read for itself. A GGUF file is dequantised by transformers as a whole, before its units are handed out: such
files are made for small models.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vltrain.errors import InputError
from vltrain.models.materialise import fill_by_name
from vltrain.models.tensor_files import open_tensors

logger = logging.getLogger(__name__)

# What a folder may hold, the first that is there counts; each has an index beside it where it is cut into several files.
FILES = ("model.safetensors", "pytorch_model.bin")
READ_BESIDE = ("config.json", "preprocessor_config.json")  # what also says what the network computes
FLOATS = {"F64", "F32", "F16", "BF16"}  # of a safetensors head
# What reading a broken or foreign file ends in, by format: JSON, safetensors, GGUF (a binary layout read field by field).
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError, struct.error, IndexError, StrictDataclassError)


class HuggingFaceWeights:
    """The weights of a folder or hub name, for an empty network of the sizes in its config.json.

    Args:
        key, source: the setting that names it (`model.llm`), and what it says, for errors.
        place: folder or hub name.
        ours: turns a name of the files into the network's.
        ignored: names that belong there and are not needed.

    Raises: InputError for files that are missing or broken, and for weights that are missing, unknown or of another shape.
    """

    def __init__(
        self, key: str, source: str, place: str, network: PreTrainedModel, ours: Callable[[str], str], ignored: re.Pattern[str]
    ) -> None:
        self.key, self.source, self.place = key, source, place
        self._files: dict[str, tuple[Path, str]] = {}  # our name -> (file, the name in it)
        expected = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
        paths, promised = self._paths()
        beside = [path for name in READ_BESIDE if (path := self._path(name) if name == "config.json" or Path(place).is_dir() else None)]
        self.files = {os.path.relpath(path, place) if Path(place).is_dir() else path.name: path for path in (*beside, *paths)}
        several = len(paths) > 1
        wrong: dict[str, list[str]] = {"missing": [], "not of this model": [], "of another shape": []}
        for path in paths:
            where = f" ({path.name})" if several else ""
            for theirs, (shape, is_float) in self._shapes(path).items():
                name = ours(theirs)
                if name in expected:
                    self._files[name] = path, theirs
                    if shape != expected[name] or not is_float:
                        found = shape if is_float else f"{shape} of whole numbers"
                        wrong["of another shape"].append(f"{theirs} {found}, expected {expected[name]}{where}")
                elif not ignored.match(theirs):
                    wrong["not of this model"].append(f"{theirs}{where}")
        by_index = {ours(theirs): name for theirs, name in promised.items()}
        missing = sorted(expected.keys() - self._files.keys())
        wrong["missing"] = [f"{name} ({by_index[name]})" if name in by_index else name for name in missing]
        if any(wrong.values()):
            told = "; ".join(f"{len(names)} {problem}: {_some(sorted(names))}" for problem, names in wrong.items() if names)
            raise InputError(
                f"{key}.source: the weights of '{source}' ({place}) do not fit a {type(network).__name__} of its config.json. "
                f"Weights {told}"
            )

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        opened: dict[Path, Callable[[str], Tensor]] = {}

        def write(ours: str, target: Tensor) -> None:
            path, theirs = self._files[ours]
            if path not in opened:
                opened[path] = self._reader(path)
            target.copy_(opened[path](theirs))

        fill_by_name(name, unit, dtype, write)

    def _paths(self) -> tuple[list[Path], dict[str, str]]:
        """The files with weights, and by the index (if there is one) each weight's file."""
        for name in FILES:
            index = self._path(f"{name}.index.json")
            if index is not None:
                try:
                    promised = dict(json.loads(index.read_text())["weight_map"])
                    names = sorted(set(map(str, promised.values())))
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise cannot_load(self.key, self.source, self.place, error) from None
                paths = {file: self._path(file) for file in names}
                absent = [file for file, path in paths.items() if path is None]
                if absent:
                    error = FileNotFoundError(f"{index.name} names {_some(absent)}, which is not there")
                    raise cannot_load(self.key, self.source, self.place, error)
                return [path for path in paths.values() if path is not None], promised
            path = self._path(name)
            if path is not None:
                return [path], {}
        error = FileNotFoundError(f"no {' or '.join(FILES)} there, whole or with an index")
        raise cannot_load(self.key, self.source, self.place, error)

    def _path(self, name: str) -> Path | None:
        """Where a file of the folder or the hub's repository is; None if it has none of that name."""
        if Path(self.place).is_dir():
            path = Path(self.place, name)
            return path if path.is_file() else None
        try:
            with quiet_transformers():
                found = cached_file(self.place, name, _raise_exceptions_for_missing_entries=False)
        except LOAD_ERRORS as error:
            raise cannot_load(self.key, self.source, self.place, error) from None
        return Path(found) if found else None

    def _shapes(self, path: Path) -> dict[str, tuple[list[int], bool]]:
        """By name: shape, and whether it holds floats."""
        if path.suffix != ".safetensors":
            return {name: (list(tensor.shape), tensor.is_floating_point()) for name, tensor in self._tensors(path).items()}
        try:
            with safe_open(path, framework="pt") as tensors:
                heads = {name: tensors.get_slice(name) for name in tensors.keys()}
                return {name: (head.get_shape(), head.get_dtype() in FLOATS) for name, head in heads.items()}
        except LOAD_ERRORS as error:
            raise cannot_load(self.key, self.source, self.place, error) from None

    def _reader(self, path: Path) -> Callable[[str], Tensor]:
        if path.suffix != ".safetensors":
            return self._tensors(path).__getitem__
        return safe_open(path, framework="pt").get_tensor

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        try:
            return open_tensors(self.key, path)
        except InputError as error:
            raise InputError(f"{self.key}.source: cannot load '{self.source}': {str(error).removeprefix(f'{self.key}.source: ')}") from None


class GgufWeights:
    """The weights of one GGUF file, dequantised by transformers; read whole with the first unit and given away unit by unit."""

    def __init__(self, key: str, source: str, folder: str, file: str, network: PreTrainedModel, dtype: torch.dtype) -> None:
        self.key, self.source, self.folder, self.file, self.dtype = key, source, folder, file, dtype
        self._class, self._config = type(network), network.config
        self._left: dict[str, nn.Parameter] | None = None
        self.files = {"file": Path(folder, file)}

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        if self._left is None:
            self._left = self._read()
        for inner, parameter in list(unit.named_parameters()):
            if parameter.is_meta:
                parent, _, leaf = inner.rpartition(".")
                setattr(unit.get_submodule(parent), leaf, nn.Parameter(self._left.pop(f"{name}.{inner}").data.to(dtype)))

    def _read(self) -> dict[str, nn.Parameter]:
        try:
            with quiet_transformers():
                # Mismatched shapes are let through here, to be named below together with everything else that is wrong.
                model, report = self._class.from_pretrained(
                    self.folder, config=self._config, dtype=self.dtype, gguf_file=self.file, ignore_mismatched_sizes=True, output_loading_info=True
                )
        except LOAD_ERRORS as error:
            raise cannot_load(self.key, self.source, self.folder, error) from None
        problems = {
            "missing": sorted(report["missing_keys"]),
            "not of this model": sorted(report["unexpected_keys"]),
            "of another shape": sorted(f"{name} {list(found)}, expected {list(due)}" for name, found, due in report["mismatched_keys"]),
        }
        if any(problems.values()):
            told = "; ".join(f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names)
            raise InputError(f"{self.key}.source: the weights of '{self.source}' ({self.folder}) do not fit its own sizes. Weights {told}")
        return dict(model.named_parameters())


def cannot_load(key: str, source: str, place: str, error: Exception) -> InputError:
    """The `InputError` for a source whose reading ended in `error`; names the broken file where it can be found."""
    where = _broken_file(Path(place)) or place
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return InputError(
        f"{key}.source: cannot load '{source}' from {where} ({type(error).__name__}: {reason}). Fetch it again, or name another source"
    )


def _broken_file(folder: Path) -> str | None:
    """The first file of `folder` that is not what its name says, and what it should be; the errors of a load do not name it."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            json.loads(path.read_text())
        except (OSError, ValueError):
            return f"{path}: not JSON"
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                continue
        except (SafetensorError, OSError):
            return f"{path}: not a whole safetensors file"
    return None


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' load report and progress bars: what they would tell is checked and raised here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
