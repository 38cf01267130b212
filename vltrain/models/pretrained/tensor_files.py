"""Files of named tensors in torch's formats or safetensors: mapped into memory, and read without running what they
hold.

A torch file is a pickle, and a pickle can be a program; `weights_only` lets none run. Mapping means that a tensor costs
memory only once it is read, and gives it back when the last tensor of the file is let go. Trade-off: no
TorchScript archives, which are code by nature, and no mapping of files in torch's format of before 2020, which are
read whole.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vltrain.errors import InputError

logger = logging.getLogger(__name__)

TENSOR_FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
WRAPPERS = ("state_dict", "model")  # what trainers keep the weights under, beside epochs and optimizers
ZIP_START = b"PK\x03\x04"


def open_tensors(key: str, path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, on the CPU, in their own dtype; what else it holds is left out.

    Args:
        key: the setting that names the file (`model.llm`), for errors.
        path: a state dict, or a dict with one under `state_dict` or `model`.

    Raises: InputError for a file that is cut off, holds code, is a TorchScript archive, or has no named tensors.
    """
    content = _read_safetensors(key, path) if path.suffix == ".safetensors" else _read_torch(key, path)
    wrappers = [name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if len(wrappers) > 1:
        raise InputError(
            f"{key}.source: {path}: holds weights under {' and '.join(wrappers)}, and only one can be meant; "
            "save that one alone"
        )
    content = content[wrappers[0]] if wrappers else content
    tensors = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise InputError(
            f"{key}.source: {path}: is not a dictionary of named tensors but a {type(content).__name__}; expected a "
            "state dict"
        )
    return tensors


def _read_safetensors(key: str, path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{key}.source: {path}: not a whole safetensors file ({error}). Fetch it again") from None


def _read_torch(key: str, path: Path) -> Any:
    zipped = _is_zip(key, path)
    if not zipped:
        logger.info("%s: %s is in torch's old format, which cannot be mapped: it is read into memory whole", key, path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{key}.source: {path}: not a plain state dict: a broken file, or one that holds more than tensors, "
            "which could be code and "
            f"was not run ({_first_line(error)}). If you trust it, save its tensors alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{key}.source: {path}: not a whole torch file ({_first_line(error)}). Fetch it again"
        ) from None


def _is_zip(key: str, path: Path) -> bool:
    """Whether this is torch's format of today. Raises InputError for a cut off file and for TorchScript."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) != ZIP_START:
                return False
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except OSError as error:
        raise InputError(f"{key}.source: {path}: cannot be read ({error.strerror})") from None
    except zipfile.BadZipFile:
        raise InputError(
            f"{key}.source: {path}: cut off ({path.stat().st_size:,} bytes and no end). Fetch it again"
        ) from None
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise InputError(
            f"{key}.source: {path}: a TorchScript archive, which is a program, and is not run. Where you trust "
            "it, save its tensors alone: "
            "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE); or name the same "
            "network's Hugging Face folder"
        )
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
