"""A folder that appears whole or not at all.

Everything is written into a hidden folder beside the final name, flushed to disk and renamed; an error on the way
removes it. What a killed process leaves behind is `.NAME.PID.tmp`, never a half-written NAME, and the next one to write
NAME removes it. One process at a time writes NAME (`vltrain.files.lock`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vltrain.errors import InputError
from vltrain.files.atomic import sync
from vltrain.files.leftovers import remove, remove_leftovers, temporary_beside
from vltrain.files.lock import lock_beside, one_writer
from vltrain.files.mode import umask_mode

_MANY = 256  # files, from which on all of their file system is flushed at once


def refuse_existing(output: Path) -> None:
    """InputError if something other than an empty folder has that name: results are never overwritten or mixed."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if os.path.lexists(output):
        raise InputError(f"{output}: exists already; remove it or name another output")


def refuse_existing_file(output: Path) -> None:
    """InputError if anything has that name, or its folder is not one: before the work for a new file is done."""
    if os.path.lexists(output):
        raise InputError(f"{output}: exists already; remove it or name another file")
    place = next(one for one in (output.parent, *output.parent.parents) if os.path.lexists(one))
    if not place.is_dir():
        raise InputError(f"{output}: {place} is no folder; name another file")


@contextmanager
def new_folder(output: Path, *, replace: bool = False) -> Generator[Path]:
    """Gives a temporary folder that becomes `output` when the block ends without an error; `replace`: in the place of
    what has that name.

    Raises:
        InputError: `output` exists, or the place cannot be written to (no permission, disk full, read-only, not a
            folder).
    """
    if not replace:
        refuse_existing(output)
    elif output.is_symlink():  # what it leads to is replaced, on its own disk
        output = Path(os.path.realpath(output))
    with one_writer(lock_beside(output), output, remedy="name another output"):
        temporary = temporary_beside(output)
        try:
            if not replace:
                refuse_existing(output)  # again: it may have appeared before the lock was ours
            for name in (output, _aside(output)):
                remove_leftovers(name)
            temporary.mkdir()
            yield temporary
            _flush(temporary)
            with _put_aside(output, replace):
                os.rename(temporary, output)
            sync(output.parent)
        except OSError as error:
            raise InputError(f"{output}: could not be written ({error}); nothing was left there") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _aside(output: Path) -> Path:
    return output.with_name(f"{output.name}.old")


@contextmanager
def _put_aside(output: Path, replace: bool) -> Generator[None]:
    """Moves away what has that name, removes it if the block ends without an error, and else puts it back."""
    if not replace or not os.path.lexists(output):
        yield
        return
    old = temporary_beside(_aside(output))
    os.rename(output, old)
    try:
        yield
    except BaseException:
        os.rename(old, output)
        raise
    remove(old)


def _flush(folder: Path) -> None:
    """Gives every file that was written here the umask's mode, whoever wrote it, and flushes it."""
    mode = umask_mode(folder)
    written: list[Path] = []
    folders: list[Path] = []
    for place, _, names in os.walk(folder):
        folders.append(Path(place))
        for name in names:
            found = os.stat(path := os.path.join(place, name))
            # A hard link is another name of a file that was there before and was not written here.
            if found.st_nlink == 1:
                if found.st_mode & 0o777 != mode:
                    os.chmod(path, mode)
                written.append(Path(path))
    if len(written) < _MANY or not _flush_file_system(folder):
        for path in (*written, *folders):
            sync(path)


def _flush_file_system(folder: Path) -> bool:
    """Flushes all of the file system that holds the folder: thousands of images one by one would wait for the disk a
    thousand times. False: no such call here."""
    flush = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if flush is None:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        if flush(handle) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(handle)
    return True
