"""What a source reads: every file that it opens and every folder that it lists while it gives its samples, and what it
looked for in vain.

Noted by Python itself (an audit hook), so that no reader, old or new, can read a file that is not in the record of what
the samples were made from. What a reader only asks about (`Path.is_file`) Python does not tell: it says so by
`is_there`. Files outside the raw data, such as Python's modules, are none of it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vltrain.errors import InputError
from vltrain.files.record import FileRecord, look, stat_of

Item = TypeVar("Item")
ELSEWHERE = "elsewhere"
_EVENTS = ("open", "os.listdir", "os.scandir")
_active: Reading | None = None
_thread = 0  # that reads: others of the program, such as a lock's, read no raw data
_is_hooked = False


class Reading:
    """Notes what is read below some places. `places`: by name, the folder or file that the user named; `facts`: what
    the reader found out about the data set itself."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self.places = dict(places)
        bases = [(place, root, root if root.is_dir() else root.parent) for place, root in self.places.items()]
        # A file belongs to the setting that names it most closely: one that is named later, or not any more, must find
        # its own files changed.
        bases.sort(key=lambda one: (one[2] == one[1], len(one[2].absolute().parts)), reverse=True)
        self._bases = [
            (place, str(root), str(base), os.path.abspath(root), os.path.abspath(base)) for place, root, base in bases
        ]
        self._named = {
            path: place for place, root in self.places.items() for path in (str(root), os.path.abspath(root))
        }
        self._stats: dict[str, tuple[int, int, int, int]] = {}
        self.facts: dict[str, str] = {}
        self.says_itself = False

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Passes items on, and notes what is opened while the next one is made; not what their taker opens."""
        global _active, _is_hooked, _thread
        if not _is_hooked:
            sys.addaudithook(_note)
            _is_hooked = True
        iterator = iter(items)
        while True:
            _active, _thread = self, threading.get_ident()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                _active = None
            yield item

    def note(self, path: str) -> None:
        if path not in self._stats and self._place_of(path) is not None:
            self._stats[path] = stat_of(path)

    def name_of(self, path: Path | str) -> tuple[str, str]:
        """(place, name there) of a file."""
        return self._place_of(str(path)) or (ELSEWHERE, os.path.abspath(path))

    def record(self, images: Iterable[Path]) -> FileRecord:
        """What was read but `images`, which have a record of their own. Raises InputError for a file that changed
        meanwhile."""
        known = set(map(str, images))
        found = FileRecord()
        for path, before in sorted(self._stats.items()):
            if path in known or (place := self._place_of(path)) is None:
                continue
            seen = look(path)
            if stat_of(path) != before:
                raise InputError(f"{path}: changed while it was read; prepare again when it is whole")
            found.add(*place, seen)
        return found

    def _place_of(self, path: str) -> tuple[str, str] | None:
        if path in self._named:
            return self._named[path], "."
        for place, root, base, _, _ in self._bases:
            if path.startswith(base + "/"):
                return place, path[len(base) + 1 :] if base == root else f"../{path[len(base) + 1 :]}"
        full = os.path.abspath(path)
        if full in self._named:
            return self._named[full], "."
        for place, _, _, root, base in self._bases:
            if full.startswith(base + os.sep):
                return place, os.path.relpath(full, root)
        return None


def is_there(path: Path) -> bool:
    """Whether something is at `path`, for a reader whose samples depend on it: noted where nothing is."""
    found = path.exists()
    if not found and _active is not None:
        _active.note(str(path))
    return found


def says_itself_what_it_reads() -> None:
    """For a reader that loads libraries while it reads, whose modules may lie below the same folder: from here on only
    what it names by `note_read` is noted."""
    if _active is not None:
        _active.says_itself = True


def note_read(path: Path | str) -> None:
    """Notes a file that is read, or a folder whose names decide what is."""
    if _active is not None:
        _active.note(str(path))


def note_facts(**facts: str | None) -> None:
    """Tells whoever watches a reader what it has found out about its data set: revision, licence, and the like."""
    if _active is not None:
        _active.facts.update({name: value for name, value in facts.items() if value})


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is None or _active.says_itself or event not in _EVENTS or threading.get_ident() != _thread:
        return
    path = arguments[0]
    if isinstance(path, (str, bytes, os.PathLike)):
        _active.note(os.fsdecode(path))  # pyright: ignore[reportUnknownArgumentType] a PathLike of either
