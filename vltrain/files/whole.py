"""Small text files that are whole or not there: written beside their name, flushed to disk and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.leftovers import remove_leftovers, temporary_beside


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all. Raises InputError if that is not possible."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, and the folders it lies in. Raises InputError if that is not possible."""
    beside = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror or error}); choose a place with room and permission") from None
