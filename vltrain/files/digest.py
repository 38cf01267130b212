"""Digests of files and folders: what something was made from, whatever it is called and wherever it lies.

SHA-256, or for images by the million XXH3 of 128 bits: it finds every edit at a twentieth of the cost, but no forger
who makes two files for it.

A digest is remembered under size, modification and change time and inode of its file, so that asking a second time
costs a stat. The change time is what no program can set: an edit that puts the modification time back is seen too. The
device is left out, since network file systems give another one on every node and after every mount; in its place
entries are kept by the path of the file's folder. What changed less than 2 s ago is not remembered: a clock's tick
could hide a second change.

Entries are in `$XDG_CACHE_HOME/vltrain/digests` (else `~/.cache`), a file per folder, replaced in one rename: no locks,
which network file systems hold badly. Of two processes that write at once one's entries are lost, which costs reading
those files again. Where the cache can't be read or written there is none; of a few small files there is none either,
since they are read as fast.

Trade-off: moving a folder keeps its digest, but it is read in full once more.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import stat
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from vltrain.errors import InputError

SETTLED_NS = 2_000_000_000
_THREADS = 8
_FEW_FILES, _FEW_BYTES = 100, 1 << 20
# V and not S: numpy strips zero bytes at the end of an S.
_ENTRY = np.dtype([("inode", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("ctime_ns", "<i8"), ("digest", "V32")])

Algorithm = Literal["sha256", "xxh3_128"]
_HASHES = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
Known = dict[tuple[int, int, int, int], bytes]
"""Digests by (inode, size, mtime_ns, ctime_ns)."""


def file_digest(path: Path | str, *, verify: bool = False) -> str:
    """SHA-256 (hex) of a file's bytes; `verify` reads them even if the digest is known. Raises InputError if it cannot
    be read."""
    return file_digests([path], verify=verify)[0]


def sha256_of(path: Path) -> str:
    """The same, always read and never remembered, for what is not taken on trust. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Sequence[Path | str], *, verify: bool = False, algorithm: Algorithm = "sha256") -> list[str]:
    """Digest (hex) of each file's bytes; links are followed.

    Args:
        verify: read every file, though its digest may be known.

    Raises:
        InputError: a file that is missing, cannot be read or is something else than a file.
    """
    by_folder: dict[str, list[int]] = defaultdict(list)
    for number, path in enumerate(paths):
        by_folder[os.path.dirname(path)].append(number)
    found = [""] * len(paths)
    for folder, numbers in by_folder.items():
        for number, digest in zip(
            numbers, _digests_in(folder, [paths[number] for number in numbers], verify, algorithm), strict=True
        ):
            found[number] = digest.hex()
    return found


def folder_digest(folder: Path | str, patterns: Iterable[str] = ("*",), *, verify: bool = False) -> str:
    """`combined_digest` of the files below a folder, by their relative names: the same wherever the folder lies.

    Args:
        patterns: shell patterns; a file counts if its relative name fits one of them.
        verify: read every file, though its digest may be known.

    Raises:
        InputError: no such folder, or a file below it that cannot be read or is something else than a file.
    """
    patterns = tuple(patterns)
    names = [name for name in files_below(folder) if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    digests = file_digests([os.path.join(folder, name) for name in names], verify=verify)
    return combined_digest(dict(zip(names, digests, strict=True)))


def combined_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over sorted names, each with its file's digest (hex)."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{len(os.fsencode(name))}:".encode() + os.fsencode(name) + digests[name].encode())
    return whole.hexdigest()


def files_below(folder: Path | str) -> list[str]:
    """Relative names (with /) of all that is no folder below `folder`, sorted; links to folders are followed, each
    folder once."""
    names: list[str] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}), expected a folder")

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()  # which of two links is followed must not depend on the file system
        names += [os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/") for name in files]
    return sorted(names)


def _digests_in(folder: str, paths: Sequence[Path | str], verify: bool, algorithm: Algorithm) -> list[bytes]:
    entries = _entries_of(folder, algorithm)
    known = _read(entries, algorithm) if entries is not None and not verify else {}
    identities = [_identity(_stat(path)) for path in paths]
    missing = [number for number, identity in enumerate(identities) if identity not in known]
    if not missing:
        return [known[identity] for identity in identities]
    with ThreadPoolExecutor(_THREADS) as pool:
        taken = dict(
            zip(missing, pool.map(partial(_read_digest, algorithm), [paths[number] for number in missing]), strict=True)
        )
    found = [taken[number][1] if number in taken else known[identity] for number, identity in enumerate(identities)]
    _add(entries, algorithm, {_identity(before): digest for before, digest in taken.values() if _is_settled(before)})
    return found


def _stat(path: Path | str) -> os.stat_result:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: not a regular file")
    return found


def _read_digest(algorithm: Algorithm, path: Path | str) -> tuple[os.stat_result, bytes]:
    """The stat from before reading, so that what is written meanwhile is not taken for what was read."""
    before = _stat(path)
    try:
        with open(path, "rb") as stream:
            return before, hashlib.file_digest(stream, _HASHES[algorithm]).digest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_settled(found: os.stat_result) -> bool:
    return time.time_ns() - found.st_ctime_ns > SETTLED_NS


def _entries_of(folder: str, algorithm: Algorithm) -> str | None:
    """The cache file for the files of a folder; None where there can be no cache."""
    place = cache_folder("digests")
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder or "."))).hexdigest()
    return None if place is None else os.path.join(place, f"{name[:32]}.{algorithm}.npy")


def cache_folder(name: str) -> str | None:
    """Where vltrain keeps `name` for this user, which may not be there yet; None where there can be no cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "vltrain", name) if os.path.isabs(base) else None


def _read(entries: str, algorithm: Algorithm) -> Known:
    try:
        table = np.load(entries, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return {}
    if table.dtype != _ENTRY or table.ndim != 1:
        return {}
    width = _HASHES[algorithm]().digest_size
    keys = zip(*(table[name].tolist() for name in ("inode", "size", "mtime_ns", "ctime_ns")), strict=True)
    return dict(zip(keys, (digest[:width] for digest in table["digest"].tolist()), strict=True))


def _add(entries: str | None, algorithm: Algorithm, new: Known) -> None:
    if entries is not None and (len(new) >= _FEW_FILES or sum(size for _, size, _, _ in new) >= _FEW_BYTES):
        _write(entries, _read(entries, algorithm) | new)


def _write(entries: str, known: Known) -> None:
    """Of several entries of an inode the last is kept: the others are of a file that was there before."""
    latest = {identity[0]: (*identity, digest) for identity, digest in known.items()}
    try:
        os.makedirs(os.path.dirname(entries), mode=0o700, exist_ok=True)
        # Not `renamed_when_written`: machines share these, and a number of a process is another's there.
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(entries), prefix=".", suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, np.array(list(latest.values()), _ENTRY), allow_pickle=False)
        os.replace(temporary, entries)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
