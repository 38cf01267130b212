"""Files that are whole or not there: written beside their name and renamed.

The one place that does so, but for the cache of `vltrain.files.digest`, which machines share. Folders that are whole or
not there are `vltrain.data.folder`'s, checkpoints `vltrain.train.checkpoints.retention`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.leftovers import remove_leftovers, temporary_beside


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a crash of the machine. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def renamed_when_written(path: Path, *, clears: bool = True) -> Generator[Path]:
    """Gives a temporary name, which becomes `path` if the block ends without an error, and is gone else. Raises
    OSError.

    Args:
        clears: remove what killed processes left beside `path` first, for which the folder is listed.
    """
    temporary = temporary_beside(path)
    if clears:
        remove_leftovers(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file, flushed to disk, whole or not at all. Raises OSError."""
    with renamed_when_written(path) as beside, beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all. Raises InputError if that is not possible."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, a text as UTF-8, and the folders it lies in. Raises InputError if that is not possible."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error.strerror or error}); choose a place with room and permission"
        ) from None
