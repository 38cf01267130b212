"""A record of the files that something was made from: whether one of them has changed since is asked in a stat each.

    record.arrow        per file: the place it is in, its name there, its XXH3 digest (128 bits)
    record.stats.npy    size, times and inode when that was taken; written anew on another disk

A file whose size, times and inode are the recorded ones has not changed; of any other the digest is compared, so that a
copy on another disk is the same, and its stat is recorded for the next time. Names are relative to places (a name in
the record, a path for whoever asks), so that neither matters. A folder counts by the names in it, and a file that was
looked for in vain by its absence, where either decided what was made.

Trade-off: a file's digest is no longer than accident needs, see `vltrain.files.digest`.
"""

from __future__ import annotations

import os
import stat
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from vltrain.errors import InputError
from vltrain.files.atomic import renamed_when_written
from vltrain.files.digest import SETTLED_NS, file_digests

FILE, FOLDER, ABSENT = 0, 1, 2  # kinds
_SHOWN = 3
_CHUNK = 2048  # files that a thread asks for at once
_THREADS = 16
_ALGORITHM = "xxh3_128"
_NO_DIGEST = bytes(16)
_NO_STAT = (-1, -1, -1, -1)
_INODE_BITS = 0x7FFF_FFFF_FFFF_FFFF  # of 64: what a signed number holds
_STATS_SUFFIX = ".stats.npy"
_STATS = ("size", "mtime_ns", "ctime_ns", "inode")
_SCHEMA = pa.schema(
    {
        "place": pa.dictionary(pa.int16(), pa.string()),
        "name": pa.string(),
        "kind": pa.int8(),
        "digest": pa.binary(16),
    }  # fmt: skip
)


class Seen(NamedTuple):
    """A file, folder or absent one as it was looked at. `stat`: size, mtime_ns, ctime_ns, inode; -1 where it says
    nothing."""

    kind: int
    digest: bytes
    stat: tuple[int, int, int, int]


def digest_of(data: bytes) -> bytes:
    """The digest of a file's bytes."""
    return xxhash.xxh3_128_digest(data)


def stat_of(path: Path | str) -> tuple[int, int, int, int]:
    """Size, mtime_ns, ctime_ns, inode; all -1 where there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return _NO_STAT
    return stat_in(found)


def stat_in(found: os.stat_result) -> tuple[int, int, int, int]:
    """`stat_of` a file whose status is known."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & _INODE_BITS


def _stats_of(paths: Sequence[Path | str]) -> array[int]:
    """`stat_of` of each. Many are asked by several threads: where files come over a network, all of the time is
    waiting."""
    if len(paths) <= _CHUNK:
        return _stats_one_by_one(paths)
    chunks = [paths[first : first + _CHUNK] for first in range(0, len(paths), _CHUNK)]
    found = array("q")
    with ThreadPoolExecutor(_THREADS) as threads:
        for stats in threads.map(_stats_one_by_one, chunks):
            found.extend(stats)
    return found


def _stats_one_by_one(paths: Sequence[Path | str]) -> array[int]:
    """In one loop: a function call for each would take as long as its stat."""
    found = array("q")
    for path in paths:
        try:
            one = os.stat(path)
        except OSError:
            found.extend(_NO_STAT)
        else:
            found.extend((one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino & _INODE_BITS))
    return found


def look(path: Path | str) -> Seen:
    """A file, a folder's names, or that nothing is there. Raises InputError for what is neither, or cannot be read."""
    before = stat_of(path)
    if before == _NO_STAT:
        return Seen(ABSENT, _NO_DIGEST, _NO_STAT)
    if os.path.isdir(path):
        return Seen(FOLDER, _digest_of_names(path), (-1, *before[1:]))  # sizes of folders are the file system's affair
    return Seen(FILE, bytes.fromhex(file_digests([path], algorithm=_ALGORITHM)[0]), before)


def _digest_of_names(folder: Path | str) -> bytes:
    try:
        return digest_of("\0".join(sorted(os.listdir(folder))).encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None


@dataclass
class FileRecord:
    """Files by place and name; `add` while something is made, `changes` ever after."""

    places: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    kinds: array[int] = field(default_factory=lambda: array("b"))
    digests: list[bytes] = field(default_factory=list)
    stats: array[int] = field(default_factory=lambda: array("q"))
    has_new_stats: bool = False
    settled_before: int = field(default_factory=lambda: time.time_ns() - SETTLED_NS)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, place: str, name: str, seen: Seen) -> None:
        """Takes a file. One that changed since the record was begun, or just before, is not trusted by its times: the
        clock's tick could hide a second change."""
        kind, digest, stat = seen
        self.places.append(place)
        self.names.append(name)
        self.kinds.append(kind)
        self.digests.append(digest)
        self.stats.extend(stat if stat[2] < self.settled_before else (stat[0], stat[1], -1, stat[3]))

    def rows(self) -> Iterator[tuple[str, str, Seen]]:
        """(place, name, what was seen) of each file."""
        width = len(_STATS)
        for number, (place, name, kind, digest) in enumerate(
            zip(self.places, self.names, self.kinds, self.digests, strict=True)
        ):
            size, mtime_ns, ctime_ns, inode = self.stats[width * number : width * (number + 1)]
            yield place, name, Seen(kind, digest, (size, mtime_ns, ctime_ns, inode))

    def extend(self, other: FileRecord) -> None:
        for name in ("places", "names", "kinds", "digests", "stats"):
            getattr(self, name).extend(getattr(other, name))

    def add_all(self, place: str, files: Iterable[tuple[str, Seen]]) -> None:
        for name, seen in files:
            self.add(place, name, seen)

    def digest(self, *places: str) -> str:
        """XXH3 (hex) over names and digests of the files in some places, in order of their names: what they hold,
        wherever they are."""
        rows = sorted(
            (name, digest)
            for place, name, digest in zip(self.places, self.names, self.digests, strict=True)
            if place in places
        )
        whole = xxhash.xxh3_128()
        for name, digest in rows:
            whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest)
        return whole.hexdigest()

    def write(self, path: Path) -> str:
        """Writes the record, whole or not at all, and the stats beside it. Returns its digest (hex), for
        `read_record`."""
        known = {place: number for number, place in enumerate(dict.fromkeys(self.places))}
        places = np.fromiter((known[place] for place in self.places), np.int16, len(self))
        columns = [
            pa.DictionaryArray.from_arrays(_column(pa.int16(), len(self), places), _texts(list(known))),
            _texts([_plain(name) for name in self.names]),
            _column(pa.int8(), len(self), self.kinds),
            _column(pa.binary(16), len(self), b"".join(self.digests)),
        ]

        def write_table(file: BinaryIO) -> None:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))

        _write_whole(path, write_table)
        self.write_stats(path)
        return look(path).digest.hex()

    def write_stats(self, path: Path) -> None:
        """Writes the stats that belong to the record at `path`."""
        _write_whole(path.with_suffix(_STATS_SUFFIX), lambda file: np.save(file, self._stats(), allow_pickle=False))

    def _stats(self) -> np.ndarray:
        return np.array(self.stats, np.int64).reshape(-1, len(_STATS))

    def changes(self, roots: Mapping[str, Path | str | None], *, verify: bool = False) -> list[str]:
        """What has changed, a line for each of the first files and one that counts the others; none: nothing has.

        Args:
            roots: where each place is now; None, or no entry: it is not looked at.
            verify: read every file, though its stat be the recorded one.

        Of files that have not changed the stat is taken over: `write_stats` if `has_new_stats`.
        """
        paths, numbers = self._paths(roots)
        stats = self._stats()
        now = np.frombuffer(_stats_of(paths), np.int64).reshape(-1, len(_STATS))
        kinds = np.frombuffer(self.kinds, np.int8)[numbers]
        compared = np.where((kinds == FOLDER)[:, None], [False, True, True, True], True)
        same = ((now == stats[numbers]) | ~compared).all(axis=1) & (not verify)
        suspects = np.flatnonzero(~same).tolist()
        changed = [(one, why) for one, why in self._look_closely(suspects, paths, numbers, now, verify)]
        if not changed and suspects:
            self._take_over(numbers[suspects], now[suspects])
        return _told([(paths[one], why) for one, why in changed])

    def take_stats(self, roots: Mapping[str, Path | str | None]) -> None:
        """Takes over the stats of all files, for whoever knows that none has changed."""
        paths, numbers = self._paths(roots)
        self._take_over(numbers, np.frombuffer(_stats_of(paths), np.int64).reshape(-1, len(_STATS)))

    def _take_over(self, numbers: np.ndarray, now: np.ndarray) -> None:
        settled = time.time_ns() - now[:, 2] > SETTLED_NS
        before = self._stats()
        before[numbers[settled]] = now[settled]
        self.has_new_stats = bool(settled.any())
        self.stats = array("q", before.tobytes())

    def _paths(self, roots: Mapping[str, Path | str | None]) -> tuple[list[str], np.ndarray]:
        told = {place: os.fspath(root) for place, root in roots.items() if root is not None}
        numbers = [number for number, place in enumerate(self.places) if place in told]
        pairs = ((told[self.places[number]], self.names[number]) for number in numbers)
        paths = [f"{root}/{name}" if name[0] != "." else path_of(root, name) for root, name in pairs]
        return paths, np.array(numbers, np.int64)

    def _look_closely(
        self, suspects: Sequence[int], paths: Sequence[str], numbers: np.ndarray, now: np.ndarray, verify: bool
    ) -> Iterator[tuple[int, str]]:
        """(place in `paths`, what is wrong with it) of those that differ."""
        files: list[int] = []
        for one in suspects:
            number = int(numbers[one])
            kind, is_there = self.kinds[number], now[one, 3] >= 0
            if kind == ABSENT or not is_there:
                if is_there != (kind != ABSENT):
                    yield one, "is new" if is_there else "is gone"
            elif kind == FOLDER:
                if not os.path.isdir(paths[one]) or _digest_of_names(paths[one]) != self.digests[number]:
                    yield one, "holds other files"
            elif not stat.S_ISREG(os.stat(paths[one]).st_mode):
                yield one, "is no file any more"
            else:
                files.append(one)
        digests = file_digests([paths[one] for one in files], verify=verify, algorithm=_ALGORITHM)
        for one, digest in zip(files, digests, strict=True):
            if bytes.fromhex(digest) != self.digests[numbers[one]]:
                yield one, "differs from what was recorded"


def path_of(root: str, name: str) -> str:
    """Where a recorded file is, below `root` or beside it (`../a.png`); `.` is the root itself."""
    if name == ".":
        return root
    return os.path.normpath(os.path.join(root, name)) if name.startswith("..") else os.path.join(root, name)


def read_record(path: Path, digest: str | None = None) -> FileRecord:
    """Reads a record. Raises InputError if it is missing or damaged, or not the one with this digest (hex)."""
    table = _read_table(path, digest)
    record = FileRecord(
        places=table["place"].cast(pa.string()).to_pylist(), names=table["name"].to_pylist(),
        kinds=array("b", table["kind"].to_numpy().astype(np.int8).tobytes()), digests=table["digest"].to_pylist(),
    )  # fmt: skip
    record.stats = array("q", _read_stats(path.with_suffix(_STATS_SUFFIX), len(record)).tobytes())
    return record


def is_recorded(path: Path, place: str, name: str, digest: str | None = None) -> bool:
    """Whether the record at `path` holds a file: looked up where it lies on disk: of a million files in 11 ms, where
    reading them all takes 0.7 s.

    Raises: InputError as `read_record`.
    """
    import pyarrow.compute as pc

    table = _read_table(path, digest)
    return bool(
        pc.any(pc.and_(pc.equal(table["place"].cast(pa.string()), place), pc.equal(table["name"], name))).as_py()
    )


def _read_table(path: Path, digest: str | None) -> pa.Table:
    try:
        if digest is not None and look(path).digest.hex() != digest:
            raise ValueError("it was changed or damaged since it was written")
        with pa.memory_map(str(path)) as stream:
            table = pa.ipc.open_file(stream).read_all()
        if table.schema != _SCHEMA:
            raise ValueError("other columns")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: is a damaged record of files ({str(error).splitlines()[0]}); make the data beside it again "
            "with --rebuild"
        ) from None
    return table


def _read_stats(path: Path, count: int) -> np.ndarray:
    """int64 [count, 4]; all -1, which no file has, where there are none."""
    with suppress(OSError, ValueError, EOFError):
        found = np.load(path, allow_pickle=False)
        if found.shape == (count, len(_STATS)) and found.dtype == np.int64:
            return found
    return np.full((count, len(_STATS)), -1, np.int64)


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with renamed_when_written(path) as beside, beside.open("wb") as file:
        write(file)


def _column(kind: pa.DataType, count: int, *buffers: Any) -> pa.Array:
    """An array without nulls of those buffers. `pa.array` would import pandas, which takes as long as preparing some
    thousands of samples."""
    return pa.Array.from_buffers(kind, count, [None, *map(pa.py_buffer, buffers)])


def _texts(texts: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:  # 2 GiB of names, which one array of this kind does not hold
        raise InputError(
            f"found {len(texts):,} files whose names take {ends[-1]:,} bytes, expected at most 2 GiB of names; "
            "prepare the data in several sets"
        )
    return _column(pa.string(), len(texts), ends.astype(np.int32), b"".join(encoded))


def _plain(name: str) -> str:
    """Arrow holds UTF-8 only; a name of other bytes is refused by whoever prepares it, long before."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _told(changes: list[tuple[str, str]]) -> list[str]:
    lines = [f"{path} {why}" for path, why in changes[:_SHOWN]]
    return [*lines, f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else lines
