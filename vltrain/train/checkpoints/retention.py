"""Which checkpoints stay, and the files that name one: `latest` and `best`.

Everything is done so that a process that dies in between leaves a folder in which every name holds: a pointer is
written beside and renamed, a checkpoint that goes is first taken out of the way by a rename, and only then deleted.

Deleted is only what was read and found to be a whole checkpoint. What is in the way and cannot be read (damaged, of
another version, not ours to open) is renamed to `skipped-step-...` and stays for ever.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vltrain.errors import InputError
from vltrain.files.atomic import replace_file, sync
from vltrain.receipts.manifest import BEST, LATEST, STEP_NAME, checkpoints_in, pointed, read_manifest

logger = logging.getLogger(__name__)

IsWhole = Callable[[Path], bool]
"""Whether a folder is a whole checkpoint, every byte of it read."""


def point(root: Path, pointer: str, name: str) -> None:
    """Lets `root/pointer` name a checkpoint. Raises OSError."""
    replace_file(root / pointer, f"{name}\n".encode())
    sync(root)


def put_in_place(partial: Path, final: Path, is_whole: IsWhole) -> None:
    """Renames a finished folder to its name. What has it already makes way, and no pointer names it meanwhile. Raises
    OSError."""
    root = final.parent
    if os.path.lexists(final):
        for pointer in (LATEST, BEST):
            if _names(root, pointer, final):
                (root / pointer).unlink()
        _make_way(final, is_whole)
    partial.rename(final)
    sync(root)


def _names(root: Path, pointer: str, final: Path) -> bool:
    try:
        return pointed(root, pointer) == final
    except InputError:  # it is about to be written anew, or is of no use here
        return False


def prune(root: Path, newest: Path, keep: int, keep_best: bool, is_whole: IsWhole) -> None:
    """Drops what is not among the newest `keep`, nor named `best`, after `newest` has been saved.

    Checkpoints of later steps are of a life that the run did not go on from: they go too, or the next resume would jump
    there.
    Raises: OSError; InputError where `best` cannot be read, since it might be any of them.
    """
    best = pointed(root, BEST) if keep_best else None
    found = [path for path in reversed(checkpoints_in(root)) if STEP_NAME.fullmatch(path.name)]
    step = _step(newest)
    for path in [path for path in found if _step(path) > step]:
        _make_way(path, is_whole)
    ours = [path for path in found if _step(path) <= step and _is_ours(path)]
    for path in ours[:-keep]:
        if path != best:
            _discard(path)
    for leftover in (*root.glob(".old-*"), *root.glob(".partial-*")):  # of lives that ended in the middle of the above
        shutil.rmtree(leftover, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_ours(path: Path) -> bool:
    """Whether it is a checkpoint that this version reads, by its manifest alone."""
    try:
        return not path.is_symlink() and read_manifest(path) is not None
    except InputError:
        return False


def _make_way(path: Path, is_whole: IsWhole) -> None:
    if not path.is_symlink() and is_whole(path):
        logger.warning("%s: removed, since the run went on from an earlier checkpoint", path)
        _discard(path)
        return
    number = 1
    while os.path.lexists(aside := path.with_name(f"skipped-{path.name}" + (f"-{number}" if number > 1 else ""))):
        number += 1
    path.rename(aside)
    logger.warning(
        "%s: cannot be used, and the run resumed from an earlier checkpoint; renamed to %s",
        path,
        aside.name,
    )


def _discard(path: Path) -> None:
    aside = path.with_name(f".old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
