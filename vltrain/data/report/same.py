"""Which images are the same, byte for byte: by size, then by their last bytes, then by a digest, so that few files are
read whole."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

from vltrain.files.digest import file_digests

_TAIL_BYTES = 4096  # of files of one size, what is compared first: headers may be alike, the last pixels hardly are


def same_images(sources: Sequence[Hashable]) -> list[int]:
    """For each image the number of the first one that is the same: an equal file, by its bytes, or drawn by an equal
    drawer.

    A file that cannot be read is like no other; whoever needs it says so.
    """
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        key = _size_of(source) if isinstance(source, Path) else source
        if key is not None:
            alike[key].append(number)
    for look in (_tail_of, file_digests):
        finer: dict[Hashable, list[int]] = defaultdict(list)
        for key, numbers in alike.items():
            if len(numbers) == 1:
                continue
            files = [path for number in numbers if isinstance(path := sources[number], Path)]
            looks: Sequence[Hashable] = look(files) if files else numbers[:1] * len(numbers)
            for number, seen in zip(numbers, looks, strict=True):
                finer[key, seen].append(number)
        alike = finer
    first = list(range(len(sources)))
    for numbers in alike.values():
        for number in numbers:
            first[number] = numbers[0]
    return first


def _size_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def _tail_of(paths: Sequence[Path]) -> list[bytes | Path]:
    tails: list[bytes | Path] = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
                tails.append(stream.read())
        except OSError:
            tails.append(path)
    return tails
