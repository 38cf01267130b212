"""Temporary files and folders beside what they will become: `.NAME.PID.tmp` beside NAME. A killed process leaves its
own behind; the next one removes it."""

from __future__ import annotations

import glob
import os
import shutil
from contextlib import suppress
from pathlib import Path

from vltrain.files.processes import is_alive


def temporary_beside(path: Path) -> Path:
    """This process's temporary name for `path`."""
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


def remove_leftovers(path: Path) -> None:
    """Removes what processes of this machine that have ended left beside `path`; for whoever holds its lock, or writes
    it in one go."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if pid.isdecimal() and (int(pid) == os.getpid() or not is_alive(int(pid))):
            remove(leftover)


def remove(path: Path) -> None:
    """Removes a file or a folder, if that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
