"""A bounded folder of blocks, each under its SHA-256, and of what is read of sets as a whole, which processes of a
machine share.

    CACHE/blocks/ab/abcd...          a block, renamed when it was whole and had its digest
                   .abcd....N.tmp    one of N bytes that is being written: its writer holds its lock
    CACHE/locks/ab                   held by whoever fetches a block that begins so
    CACHE/size                       bytes of all blocks and sets, begun ones too; locked while it is changed
    CACHE/sets/CHECKSUM/             manifest, index, digests of blocks
                        .used        held by all who read the set, together; its time is when it was opened last
                        .lock        held by whoever fetches one of its files

All locks are the kernel's: a killed process lets go of them, and what it had begun is removed by the next one that
makes room. The block that was used, or fetched for use, longest ago goes first, and so does a set that was opened
longest ago, unless somebody reads it: whoever opens one, and whoever removes one, holds CACHE/size meanwhile. Fetching
ahead follows the plan, and so what is needed soonest is never what goes while it fits in. Reading checks a block's
digest once more, and gives its bytes, so that one may be removed while it is used. Trade-off: what will be needed later
than what is fetched ahead is judged by its past use, since which images a pack shows is only known when it is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vltrain.config.schema import DataConfig
from vltrain.errors import OF_THE_MACHINE, InputError
from vltrain.files.atomic import replace_file
from vltrain.files.digest import cache_folder

logger = logging.getLogger(__name__)

KEY, SIZE_KEY = "data.cache", "data.cache_gib"
GIB = 2**30
IN_MEMORY = 128  # blocks that a process keeps beside what is on disk
FREED = 0.1  # of the bound, when room is made: a look at all blocks takes a while
LEAST_BLOCKS = 4  # for each rank
USED = ".used"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """folder: None: in the user's cache (`$XDG_CACHE_HOME/vltrain/packs`); gib: bound of what is in it, in GiB."""

    folder: str | None = None
    gib: float = 32.0

    @classmethod
    def of(cls, data: DataConfig) -> CacheSettings:
        """A recipe's."""
        return cls(folder=data.cache, gib=data.cache_gib)

    @property
    def max_bytes(self) -> int:
        return int(self.gib * GIB)


class BlockCache:
    """Blocks by their digests. Used from several threads and processes."""

    def __init__(self, settings: CacheSettings) -> None:
        """Raises InputError for a folder that cannot be written."""
        place = settings.folder or cache_folder("packs")
        if place is None:
            raise InputError(f"{KEY}: there is no place for a cache here; name a folder")
        self.folder, self.max_bytes = Path(place).expanduser().absolute(), settings.max_bytes
        self._memory: OrderedDict[bytes, bytes] = OrderedDict()
        self._guard = threading.Lock()
        with self._told():
            for name in ("blocks", "locks", "sets"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".writable-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()

    def require_room(self, block_bytes: int, all_bytes: int, ranks: int) -> None:
        """Raises InputError where the bound, or the disk, cannot hold what is needed at once or what it is meant to.

        Args:
            all_bytes: of all blocks that may come.
            ranks: that share it.
        """
        with self._told(), self._counted() as counter:
            in_use = sum(size for _, size, path in self._sets() if not _is_free(path))
            free, held = shutil.disk_usage(self.folder).free, counter.bytes - in_use
        least = LEAST_BLOCKS * ranks * block_bytes + in_use
        if self.max_bytes < least:
            raise InputError(
                f"{SIZE_KEY}: found {self.max_bytes / GIB:g} GiB, expected at least {least / GIB:.3g}: {LEAST_BLOCKS} "
                f"blocks of {block_bytes / 2**20:g} MiB for each of {ranks} rank(s) on this machine, and "
                f"{in_use / 2**20:.3g} MiB of what is read as a whole of the sets that are in use"
            )
        wanted = min(self.max_bytes - in_use, all_bytes)
        if free + held < wanted:
            raise InputError(
                f"{SIZE_KEY}: {self.folder} shall hold {wanted / GIB:.3g} GiB, but its disk has {free / GIB:.3g} free "
                f"beside {held / GIB:.3g} of blocks that are there; lower it, or name another folder ({KEY})"
            )

    def size(self) -> int:
        """Bytes of all blocks and sets."""
        with self._counted() as counter:
            return counter.bytes

    def read(self, digest: bytes, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """A block. `fetch` gives it, checked, where it is not here. Raises what `fetch` does, and InputError where the
        cache cannot be written."""
        with self._guard:
            found = self._memory.pop(digest, None)
            if found is not None:
                self._memory[digest] = found
                return found
        found = self._read(digest, num_bytes)
        if found is None:
            with self._only_fetcher(digest):
                found = self._read(digest, num_bytes)
                if found is None:
                    found = fetch()
                    self._write(digest, found)
        with self._guard:
            self._memory[digest] = found
            while len(self._memory) > IN_MEMORY:
                self._memory.popitem(last=False)
        return found

    def keep(self, digest: bytes, num_bytes: int, fetch: Callable[[], bytes]) -> None:
        """Sees to it that a block is here, as the one used last. Raises as `read`."""
        if self._touch(digest, num_bytes):
            return
        with self._only_fetcher(digest):
            if not self._touch(digest, num_bytes):
                self._write(digest, fetch())

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.folder / "blocks" / name[:2] / name

    def _touch(self, digest: bytes, num_bytes: int) -> bool:
        path = self._path(digest)
        try:
            os.utime(path)
            return path.stat().st_size == num_bytes
        except OSError:
            return False

    def _read(self, digest: bytes, num_bytes: int) -> bytes | None:
        """None where it is not here, or is damaged: then it is removed."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: cannot be read (%s), fetched again", path, error.strerror)
            return None
        if len(data) == num_bytes and hashlib.sha256(data).digest() == digest:
            with suppress(OSError):
                os.utime(path)
            return data
        logger.warning("%s: is damaged, fetched again", path)
        with suppress(OSError):
            path.unlink()
        return None

    def _write(self, digest: bytes, data: bytes) -> None:
        path = self._path(digest)
        with self._told():
            path.parent.mkdir(exist_ok=True)
            beside = path.with_name(f".{path.name}.{len(data)}.{uuid.uuid4().hex[:8]}.tmp")
            with self._counted() as counter:
                self._reserve(counter, len(data))
                handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise

    def _reserve(self, counter: _Counter, num_bytes: int) -> None:
        """Counts what will be written, after making room for it."""
        if counter.bytes + num_bytes > self.max_bytes:
            counter.bytes = self._make_room(int(self.max_bytes * (1 - FREED)) - num_bytes)
        counter.bytes += num_bytes

    def _make_room(self, bound: int) -> int:
        """Removes what killed processes had begun, and blocks and sets that nobody reads, those used longest ago first,
        until the rest is within the bound. Returns its bytes. While the size is locked."""
        sets = self._sets()
        found, are_sets = list(sets), {path for _, _, path in sets}
        begun = 0
        for folder in os.scandir(self.folder / "blocks"):
            for entry in os.scandir(folder.path):
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".tmp"):
                        begun += _bytes_begun(entry)
                    else:
                        stat = entry.stat()
                        found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = begun + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= bound:
                break
            if path in are_sets:
                if _is_free(path):
                    shutil.rmtree(path)
                    total -= size
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _sets(self) -> list[tuple[int, int, str]]:
        """(when it was opened last, bytes, path) of each set."""
        found = list[tuple[int, int, str]]()
        for folder in os.scandir(self.folder / "sets"):
            opened = num_bytes = 0
            for entry in os.scandir(folder.path):
                with suppress(FileNotFoundError):  # one that is being written, and renamed just now
                    stat = entry.stat()
                    num_bytes += stat.st_size
                    opened = stat.st_mtime_ns if entry.name == USED else opened
            found.append((opened, num_bytes, folder.path))
        return found

    @contextmanager
    def _counted(self) -> Generator[_Counter]:
        """The bytes of all blocks, as of this process alone inside of the block."""
        path = self.folder / "size"
        with _locked(path) as handle:
            text = os.pread(handle, 32, 0)
            counter = _Counter(int(text) if text.isdigit() else self._make_room(self.max_bytes))
            yield counter
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(counter.bytes).encode(), 0)

    @contextmanager
    def _only_fetcher(self, digest: bytes) -> Generator[None]:
        with ExitStack() as held:
            with self._told():
                held.enter_context(_locked(self.folder / "locks" / digest.hex()[:2]))
            yield

    def open_set(self, name: str) -> OpenSet:
        """The folder in `sets` of that name, made where it is missing. Raises InputError where it cannot be written."""
        place = self.folder / "sets" / name
        with self._told(), self._counted():
            place.mkdir(exist_ok=True)
            return OpenSet(place)

    @contextmanager
    def filling(self, place: OpenSet) -> Generator[None]:
        """No other process fills that set inside the block."""
        with ExitStack() as held:
            with self._told():
                held.enter_context(_locked(place.folder / ".lock"))
            yield

    def put(self, path: Path, data: bytes) -> None:
        """Writes a file of an open set. Raises InputError where it cannot be written."""
        with self._told():
            with self._counted() as counter:
                self._reserve(counter, len(data))
            replace_file(path, data)

    @contextmanager
    def _told(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            advice = OF_THE_MACHINE.get(error.errno or 0, "name a folder of a local disk")
            raise InputError(
                f"{KEY}: {error.filename or self.folder}: cannot be written ({error.strerror}); {advice} ({KEY}, "
                f"{SIZE_KEY})"
            ) from None


class OpenSet:
    """A set's folder that is not removed as long as this is there, in any process that has one of its own."""

    def __init__(self, folder: Path) -> None:
        """While the size is locked. Raises OSError."""
        self.folder = folder
        handle = os.open(folder / USED, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(handle)


@dataclass
class _Counter:
    bytes: int


def _is_free(path: str) -> bool:
    """Whether nobody reads a set. While the size is locked, so that nobody opens it before it is removed."""
    handle = os.open(os.path.join(path, USED), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def _locked(path: Path) -> Generator[int]:
    """Holds the lock of a file, which is made where it is missing; waits for others."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _bytes_begun(entry: os.DirEntry[str]) -> int:
    """Bytes that a block will have that is being written; one of a process that has ended is removed, 0."""
    handle = os.open(entry.path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(entry.name.split(".")[2])
    finally:
        os.close(handle)
    os.unlink(entry.path)
    return 0
