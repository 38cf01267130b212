"""Which checkpoints stay, and the files that name one: `latest` and `best`.

Everything is done so that a process that dies in between leaves a folder in which every name holds: a pointer is written beside and
renamed, a checkpoint that goes is first taken out of the way by a rename, and only then deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

LATEST, BEST = "latest", "best"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def point(root: Path, pointer: str, name: str) -> None:
    """Lets `root/pointer` name a checkpoint. Raises OSError."""
    beside = root / f".{pointer}"
    beside.write_text(name + "\n")
    sync(beside)
    beside.rename(root / pointer)
    sync(root)


def pointed(root: Path, pointer: str) -> Path | None:
    """The folder that a pointer names; None where there is no pointer, or the checkpoint is gone."""
    try:
        path = root / (root / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return path if path.parent == root and path.name.startswith("step-") and path.is_dir() else None


def put_in_place(partial: Path, final: Path) -> None:
    """Renames a finished folder to its name. One that has it already makes way, and no pointer names it meanwhile. Raises OSError."""
    root = final.parent
    if final.exists():
        for pointer in (LATEST, BEST):
            if pointed(root, pointer) == final:
                (root / pointer).unlink()
        _discard(final)
    partial.rename(final)
    sync(root)


def prune(root: Path, newest: Path, keep: int, keep_best: bool) -> None:
    """Drops what is not among the newest `keep`, nor named `best`, after `newest` has been saved.

    Checkpoints of later steps are of a life that the run did not go on from: they go too, or the next resume would jump there.
    """
    best = pointed(root, BEST) if keep_best else None
    found = sorted(root.glob("step-*"))
    later = [path for path in found if path.name > newest.name]
    for path in later:
        logger.warning("%s: removed, since the run went on from an earlier checkpoint", path)
    earlier = [path for path in found if path.name <= newest.name]
    for path in (*later, *earlier[:-keep]):
        if path != best or path in later:
            _discard(path)
    for leftover in (*root.glob(".old-*"), *root.glob(".partial-*")):  # of lives that ended in the middle of the above
        shutil.rmtree(leftover, ignore_errors=True)


def _discard(path: Path) -> None:
    aside = path.with_name(f".old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
