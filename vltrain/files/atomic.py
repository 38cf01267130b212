"""Small files that are whole or not there: written beside their name, flushed to disk and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.leftovers import renamed_when_written


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a crash of the machine. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all. Raises InputError if that is not possible."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, a text as UTF-8, and the folders it lies in. Raises InputError if that is not possible."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_when_written(path) as beside, beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error.strerror or error}); choose a place with room and permission"
        ) from None
