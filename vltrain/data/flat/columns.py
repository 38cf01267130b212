"""Columns of numbers and texts in flat files: appended while they are made, then mapped.

The files have no name: they lie on the disk that is written to, count for no one who looks into its folders, and are
gone with the process that made them, however it ends.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

AT_ONCE = 1 << 16  # rows that are looked at together


class Column:
    """Numbers of one kind."""

    def __init__(self, folder: Path, kind: type[np.generic]) -> None:
        """`folder`: on whose disk they lie. Raises OSError, as all that writes."""
        self._kind = np.dtype(kind)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 it lives as long as the column
        self._num_bytes = 0

    def __len__(self) -> int:
        return self._num_bytes // self._kind.itemsize

    def extend(self, values: Sequence[int] | array[int] | np.ndarray) -> None:
        """Appends numbers; those of an array of the column's own kind as they are."""
        if len(values):
            self.write(np.asarray(values, self._kind).tobytes())

    def write(self, data: bytes) -> None:
        """Appends the bytes of such numbers."""
        self._num_bytes += self._file.write(data)

    def values(self) -> np.ndarray:
        """All of them, mapped and read-only; what is appended later is not among them."""
        if not self._num_bytes:
            return np.empty(0, self._kind)
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), self._num_bytes, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, self._kind)  # as an array, since slicing a memmap takes ten times as long

    def finish(self) -> np.ndarray:
        """`values` of a column that takes no more."""
        values = self.values()
        self.close()
        return values

    def close(self) -> None:
        """Gives the file up; arrays that `values` gave stay."""
        self._file.close()


class Texts:
    """Texts by their numbers, in UTF-8."""

    def __init__(self, folder: Path) -> None:
        self._bytes, self._ends = Column(folder, np.uint8), Column(folder, np.int64)
        self._mapped: tuple[Any, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def extend(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        first = len(self._bytes)
        self._bytes.write(b"".join(encoded))
        self._ends.extend(first + np.cumsum([*map(len, encoded)], dtype=np.int64))
        self._mapped = None

    def __getitem__(self, number: int) -> str:
        """The text of that number, from 0."""
        data, ends = self._maps()
        return data[int(ends[number - 1]) if number else 0 : int(ends[number])].tobytes().decode()

    def of(self, numbers: np.ndarray) -> list[str]:
        """The texts of some numbers."""
        data, ends = self._maps()
        starts = np.where(numbers > 0, ends[numbers - 1], 0)
        return [
            data[start:end].tobytes().decode()
            for start, end in zip(starts.tolist(), ends[numbers].tolist(), strict=True)
        ]

    def __iter__(self) -> Iterator[str]:
        for part in in_slices(len(self)):
            yield from self.of(np.arange(int(part.start), int(part.stop)))

    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        if self._mapped is None:
            self._mapped = self._bytes.values(), self._ends.values()
        return self._mapped

    def close(self) -> None:
        self._bytes.close()
        self._ends.close()


def in_slices(count: int) -> Iterable[slice]:
    """Consecutive slices of `count` rows, each of AT_ONCE but the last."""
    return (slice(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE))
