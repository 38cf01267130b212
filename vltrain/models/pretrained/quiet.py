"""transformers without its own talk, and what goes wrong inside it as one line that names the broken file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vltrain.errors import InputError
from vltrain.files.strict_json import read_object

# What reading a broken or foreign file ends in, by format: JSON, safetensors, GGUF (a binary layout read field by
# field).
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    EOFError,
    SafetensorError,
    struct.error,
    IndexError,
    StrictDataclassError,
)


def cannot_load(key: str, source: str, place: str, error: Exception) -> InputError:
    """The `InputError` for a source whose reading ended in `error`; names the broken file where it can be found."""
    where = _broken_file(Path(place)) or place
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return InputError(
        f"{key}.source: cannot load '{source}' from {where} ({type(error).__name__}: {reason}). Fetch it again, "
        "or name another source"
    )


def read_settings(key: str, source: str, path: Path) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds, read strictly: no key twice, no NaN. Raises InputError naming
    the setting and the file."""
    try:
        return read_object(path)
    except InputError as error:
        raise InputError(
            f"{key}.source: cannot load '{source}': {error}. Fetch it again, or name another source"
        ) from None


def find_file(key: str, source: str, place: str, name: str, *, fetch: bool = True) -> Path | None:
    """Where a file of the folder or the hub's repository `place` is; None if it has none of that name. `fetch`:
    download what is not on this machine.

    Raises: InputError if the hub cannot be asked.
    """
    if Path(place).is_dir():
        path = Path(place, name)
        return path if path.is_file() else None
    try:
        with quiet_transformers():
            found = cached_file(place, name, _raise_exceptions_for_missing_entries=False, local_files_only=not fetch)
    except LOAD_ERRORS as error:
        raise cannot_load(key, source, place, error) from None
    return Path(found) if found else None


def _broken_file(folder: Path) -> str | None:
    """The first file of `folder` that is not what its name says, and what it should be; the errors of a load do not
    name it."""
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


def some(names: list[str], most: int = 5) -> str:
    """The first few of many names."""
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
