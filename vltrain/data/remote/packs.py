"""A set of packs at an address: what is read of it as a whole, and rows and images by the blocks that hold them.

    manifest, index, digests of the blocks (`vltrain.data.remote.blocks`), made_from.json    fetched whole when it opens
    packs and images                                                                         by blocks, when needed

A block is fetched by whoever of this machine needs it first, checked by its digest, and kept in the cache. One that
arrives damaged is fetched again. Trade-off: what a block holds beside what is needed comes too, and serves where the
cache has room for it until then.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from vltrain.data.flat.mapped import RowPlaces
from vltrain.data.remote.blocks import BLOCKS, HEAD_BYTES, FileBlocks, is_whole, length_of, read_blocks
from vltrain.data.remote.cache import BlockCache, CacheSettings
from vltrain.data.remote.store import OPENING_PAUSES, PAUSES, Store, tell
from vltrain.errors import InputError

TRIES = 4  # of a block that arrives damaged
_PART_BYTES = 4 << 20  # of what is fetched whole
_THREADS = 8
_END = b"ARROW1"  # of a shard
Manifest = TypeVar("Manifest")
T = TypeVar("T")
_RECOPY = "copy the folder anew, or pack the samples again"


class ShardFacts(Protocol):
    """A file of the set, as its manifest says. sha256: hex."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Head:
    """Where what was fetched whole lies. checksum: of the manifest."""

    folder: Path
    checksum: str


class RemotePacks:
    """Picklable: another process opens the same cache and connects anew."""

    def __init__(self, address: str, settings: CacheSettings, head: Head | None = None) -> None:
        """Raises InputError for an address that cannot be read from here, and a cache that cannot be written."""
        self.store, self.settings, self.head = Store(address), settings, head
        self.cache = BlockCache(settings)
        self._open_set = None if head is None else self.cache.open_set(head.folder.name)

    def manifest(self, name: str, parse: Callable[[str, str], Manifest]) -> tuple[Manifest, bytes]:
        """The manifest, and its text.

        Args:
            parse: its text and how messages call it -> the manifest. Raises InputError for what is none.

        Raises: InputError where there is none, or no rights to read it.
        """

        def parsed(data: bytes) -> tuple[Manifest, bytes]:
            try:
                return parse(data.decode(), self.store.name(name)), data
            except UnicodeDecodeError:
                raise InputError(f"{self.store.name(name)}: not a manifest; {_RECOPY}") from None

        found = self._good(name, parsed)
        if found is None:
            raise InputError(
                f"{self.store.address}: not a folder of packed shards, or no such folder or bucket (it has no {name})"
            )
        return found

    def fetch_head(
        self,
        checksum: str,
        manifest: tuple[str, bytes],
        record: tuple[str, Callable[[Path], object]],
        index: ShardFacts,
    ) -> Head:
        """Fetches what is read as a whole, where it is not here from an earlier time.

        Args:
            checksum: of the manifest.
            manifest: its name and text.
            record: name of a file that need not be there, and what reads it in a folder, or raises InputError.
            index: of the packs.

        Raises: InputError for what is missing or stays damaged.
        """
        self._open_set = place = self.cache.open_set(checksum[:32])
        folder = place.folder
        with self.cache.filling(place):

            def keep(data: bytes) -> None:
                self._replace(folder / record[0], data)
                record[1](folder)

            self._replace(folder / manifest[0], manifest[1])
            self._good(record[0], keep)
            self._fetch_whole(folder / index.name, lambda: index.bytes, lambda data: _sha256(data) == index.sha256)
            self._fetch_whole(folder / BLOCKS, self._length_of_blocks, is_whole)
        self.head = Head(folder, checksum)
        return self.head

    def _replace(self, path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            self.cache.put(path, data)

    def _length_of_blocks(self) -> int:
        return length_of(self._opening(BLOCKS, 0, HEAD_BYTES), self.store.name(BLOCKS))

    def _good(self, name: str, take: Callable[[bytes], T]) -> T | None:
        """What `take` makes of an object, which is fetched again where that raises InputError; None where there is
        none."""
        for tries_left in reversed(range(TRIES)):
            try:
                data = self.store.read(name, pauses=OPENING_PAUSES)
            except FileNotFoundError:
                return None
            try:
                return take(data)
            except InputError:
                if not tries_left:
                    raise
                tell(f"{self.store.name(name)}: arrived damaged, fetched again")
        raise AssertionError("the last try returns or raises")

    def _opening(self, name: str, start: int, end: int) -> bytes:
        try:
            return self.store.read(name, start, end, pauses=OPENING_PAUSES)
        except FileNotFoundError:
            old = f": packs that go to an address have it since they are written; {_RECOPY}" if name == BLOCKS else ""
            raise InputError(f"{self.store.name(name)}: is not there{old or f'; {_RECOPY}'}") from None

    def _fetch_whole(self, path: Path, length: Callable[[], int], is_good: Callable[[bytes], bool]) -> None:
        """`length`: gives its bytes; by a read that may be damaged, too."""
        if path.is_file():  # whole, since it was renamed when it was
            return
        for tries_left in reversed(range(TRIES)):
            try:
                num_bytes = length()
            except InputError:
                if not tries_left:
                    raise
                continue
            with ThreadPoolExecutor(_THREADS) as pool:
                data = b"".join(pool.map(functools.partial(self._part, path.name, num_bytes), _starts(num_bytes)))
            if is_good(data):
                self.cache.put(path, data)
                return
            tell(f"{self.store.name(path.name)}: arrived damaged, fetched again")
        raise InputError(
            f"{self.store.name(path.name)}: arrived damaged {TRIES} times (its SHA-256 is not the one that was kept); "
            f"{_RECOPY}"
        )

    def require_whole(self, files: Sequence[ShardFacts], ranks: int) -> None:
        """Raises InputError for a shard that is missing, or of another size, by its last bytes; and for a cache that
        cannot hold what it is to."""
        self.cache.require_room(self._blocks[0], sum(file.bytes for file in files), ranks)
        with ThreadPoolExecutor(2 * _THREADS) as pool:
            for file, is_whole_there in zip(files, pool.map(self._ends, files)):
                if not is_whole_there:
                    raise InputError(
                        f"{self.store.name(file.name)}: does not end after the {file.bytes} bytes that the manifest "
                        f"says; {_RECOPY}"
                    )

    def damaged(self, files: Sequence[ShardFacts]) -> Iterator[str]:
        """Reads every byte of the files and tells of each that has not the manifest's SHA-256. The cache takes no part.
        Raises InputError for one that cannot be read."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for file in files:
                found = ""
                for _ in range(2):  # the second time: it may have been hurt on its way
                    whole = hashlib.sha256()
                    for data in pool.map(functools.partial(self._part, file.name, file.bytes), _starts(file.bytes)):
                        whole.update(data)
                    found = whole.hexdigest()
                    if found == file.sha256:
                        break
                else:
                    yield (
                        f"{self.store.name(file.name)}: SHA-256 is {found}, the manifest says {file.sha256}: the file "
                        f"is damaged; {_RECOPY}"
                    )

    def _part(self, name: str, num_bytes: int, start: int) -> bytes:
        return self._opening(name, start, min(start + _PART_BYTES, num_bytes))

    def _ends(self, file: ShardFacts) -> bool:
        return any(self._opening(file.name, file.bytes - len(_END), file.bytes) == _END for _ in range(TRIES))

    @functools.cached_property
    def _blocks(self) -> tuple[int, dict[str, FileBlocks]]:
        assert self.head is not None, "not opened"
        return read_blocks(self.head.folder / BLOCKS, self.head.checksum, self.store.name(BLOCKS))

    def table(self, files: Sequence[ShardFacts], schema: pa.Schema, rows_per_batch: int) -> RemoteTable:
        return RemoteTable(self, files, schema, rows_per_batch)

    def blocks_of(self, file: ShardFacts) -> FileBlocks:
        """Raises InputError where the index has none of the file, or other ones."""
        block_bytes, found = self._blocks
        blocks = found.get(file.name)
        if blocks is None or len(blocks.digests) != -(-file.bytes // block_bytes):
            raise InputError(f"{self.store.name(BLOCKS)}: does not fit {file.name} of the manifest; {_RECOPY}")
        return blocks

    def bytes_of(self, file: ShardFacts, start: int, end: int) -> bytes:
        """The bytes of a shard from `start` to before `end`, by the blocks that hold them."""
        size = self._blocks[0]
        parts = [self.cache.read(*self._block(file, number)) for number in range(start // size, -(-end // size))]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        first = start // size * size
        return whole[start - first : end - first]

    def keep(self, file: ShardFacts, start: int, end: int) -> int:
        """Fetches the same into the cache. Returns the bytes of its blocks."""
        size = self._blocks[0]
        kept = 0
        for number in range(start // size, -(-end // size)):
            digest, num_bytes, fetch = self._block(file, number)
            self.cache.keep(digest, num_bytes, fetch)
            kept += num_bytes
        return kept

    def _block(self, file: ShardFacts, number: int) -> tuple[bytes, int, Callable[[], bytes]]:
        """(digest, bytes, what fetches it) of a block."""
        size = self._blocks[0]
        digest = self.blocks_of(file).digests[number].as_py()
        start, end = number * size, min((number + 1) * size, file.bytes)
        return digest, end - start, functools.partial(self._fetch, file.name, start, end, digest)

    def _fetch(self, name: str, start: int, end: int, digest: bytes) -> bytes:
        found = b""
        for _ in range(TRIES):
            data = self.store.read(name, start, end, pauses=PAUSES)
            found = hashlib.sha256(data).digest()
            if found == digest:
                return data
            tell(f"{self.store.name(name)}: bytes {start} to {end} arrived damaged, fetched again")
        raise InputError(
            f"{self.store.name(name)}: bytes {start} to {end} are damaged (SHA-256 {found.hex()}, expected "
            f"{digest.hex()}, {TRIES} times); {_RECOPY}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.store.address, "settings": self.settings, "head": self.head}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["address"], state["settings"], state["head"])


class RemoteTable:
    """Rows spread over several shards, as `vltrain.data.shards` finds them in files that are here."""

    def __init__(self, packs: RemotePacks, files: Sequence[ShardFacts], schema: pa.Schema, rows_per_batch: int) -> None:
        self._packs, self._files, self._schema = packs, files, schema
        self._places = RowPlaces([file.rows for file in files], rows_per_batch)
        self._batch = functools.lru_cache(maxsize=8)(self._read_batch)

    def find(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The record batch that holds `row`, and its place in it."""
        number, batch, place = self._places.find(row)
        return self._batch(number, batch), place

    def image(self, row: int) -> bytes:
        """The bytes in a row of images."""
        file, start, end = self._image(row)
        return self._packs.bytes_of(file, start, end)

    def keep_image(self, row: int) -> int:
        """Fetches them. Returns the bytes of their blocks."""
        return self._packs.keep(*self._image(row))

    def keep(self, row: int) -> int:
        """Fetches the record batch that holds `row`. Returns the bytes of its blocks."""
        number, batch, _ = self._places.find(row)
        blocks = self._packs.blocks_of(self._files[number])
        return self._packs.keep(self._files[number], int(blocks.starts[batch]), int(blocks.ends[batch]))

    def _image(self, row: int) -> tuple[ShardFacts, int, int]:
        number, batch, place = self._places.find(row)
        file = self._files[number]
        blocks = self._packs.blocks_of(file)
        at, data = int(blocks.offsets[batch]) + 8 * place, int(blocks.data[batch])
        offsets = self._packs.bytes_of(file, at, at + 16)
        start, end = (int.from_bytes(offsets[part : part + 8], "little") for part in (0, 8))
        return file, data + start, data + end

    def _read_batch(self, number: int, batch: int) -> pa.RecordBatch:
        file = self._files[number]
        blocks = self._packs.blocks_of(file)
        data = self._packs.bytes_of(file, int(blocks.starts[batch]), int(blocks.ends[batch]))
        return pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(data)), self._schema)


def _starts(num_bytes: int) -> range:
    return range(0, num_bytes, _PART_BYTES)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
