"""Rows of shards that are here: Arrow files, mapped when they are first needed, and only while they are the ones that
were opened."""

from __future__ import annotations

import functools
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from vltrain.errors import InputError

Stamp = tuple[int, int]
"""A file's size and modification time in ns: packs that are made anew may have the same size to the byte."""


def stamp_of(path: Path | str) -> Stamp:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def require_opened(path: Path | str, stamp: Stamp) -> None:
    """Raises InputError unless the file is still the one that was opened."""
    if stamp_of(path) != stamp:
        raise InputError(f"{path}: was replaced while it was in use (a --rebuild of the same data.root?); start again")


class RowPlaces:
    """Where rows lie that are spread over several Arrow files, by arithmetic."""

    def __init__(self, rows: Iterable[int], rows_per_batch: int) -> None:
        """Args:
        rows: of each file.
        rows_per_batch: of every record batch but a file's last.
        """
        self._ends, self._rows_per_batch = list(accumulate(rows)), rows_per_batch

    def find(self, row: int) -> tuple[int, int, int]:
        """(file, record batch in it, row in that)"""
        if not 0 <= row < (self._ends[-1] if self._ends else 0):
            raise IndexError(f"row {row} of {self._ends[-1] if self._ends else 0}")
        number = bisect_right(self._ends, row)
        inside = row - (self._ends[number - 1] if number else 0)
        return number, inside // self._rows_per_batch, inside % self._rows_per_batch


class MappedTable:
    """Rows spread over several Arrow files, each file mapped when it is first needed."""

    def __init__(self, folder: Path, rows: Mapping[str, int], stamps: Mapping[str, Stamp], rows_per_batch: int) -> None:
        """Args:
        rows: of each file, by its name.
        stamps: of the files, as they were opened.
        rows_per_batch: of every record batch but a file's last.
        """
        self._paths = [str(folder / name) for name in rows]
        self._stamps = {str(folder / name): stamps[name] for name in rows}
        self._places = RowPlaces(rows.values(), rows_per_batch)
        # Mapped files cost address space and a file handle each, so only the last used stay open.
        self._open = functools.lru_cache(maxsize=64)(self._map)

    def _map(self, path: str) -> pa.ipc.RecordBatchFileReader:
        require_opened(path, self._stamps[path])
        return pa.ipc.open_file(pa.memory_map(path))

    def find(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The record batch that holds `row`, and its place in it."""
        number, batch, place = self._places.find(row)
        return self._open(self._paths[number]).get_batch(batch), place
