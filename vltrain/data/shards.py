"""Packed shards: a folder of memory-mapped Arrow files with random access to every pack, and its proof of wholeness.

    manifest.json        what was packed with what, and rows, bytes and SHA-256 of every other file; carries its own
                         checksum
    index.arrow          per pack: tokens, label tokens, images, samples, sum of squared segment lengths
    packs-NNNNN.arrow    the packs
    images-NNNNN.arrow   each distinct image once, as the bytes of its file; packs refer to it by number
    blocks.index         digests of blocks, for packs at an address (`vltrain.data.remote.blocks`); not in the manifest

Opening reads the manifest and maps files when they are first needed: nothing is kept in memory per pack, so a set of
1e8 packs opens like a small one. Two sizes are fixed so that a row's place is arithmetic: rows of a record batch, and
(but for the last) rows of a file. Trade-off: no adding to a set, no compression. `vltrain.data.shard_writer`
writes such a folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vltrain.data.flat.index import Index, read_index
from vltrain.data.flat.mapped import MappedTable, Stamp, require_opened, stamp_of
from vltrain.data.origin import MADE_FROM, read_made_from, require_whole_record
from vltrain.data.remote.address import is_address
from vltrain.data.remote.ahead import Ahead
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.remote.packs import RemotePacks, RemoteTable
from vltrain.errors import InputError
from vltrain.files.digest import sha256_of
from vltrain.files.strict_json import is_object, parse_json, read_text
from vltrain.schema import ImageSize, PackedRow

FORMAT_VERSION, STOCK_FORMAT = 2, 3
"""Of most models' packs; of a stock model's, which have more columns."""
MANIFEST, INDEX = "manifest.json", "index.arrow"
ROWS_PER_BATCH = 64
FILE_NAME = re.compile(r"[A-Za-z0-9_]+(-[0-9]+)?\.[a-z]+")
_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.bool_()),
    "segment_lengths": pa.list_(pa.int32()),
    "image_ids": pa.list_(pa.int64()),
    "image_slots": pa.list_(pa.int32()),
    "sample_ids": pa.list_(pa.string()),
    "instruction_ids": pa.list_(pa.int32()),
    "instruction_lengths": pa.list_(pa.int32()),
}
PACK_SCHEMA = pa.schema(_COLUMNS)
STOCK_SCHEMA = pa.schema(
    {
        **_COLUMNS,
        "position_ids": pa.list_(pa.int32()),  # row after row
        "blocks": pa.list_(pa.int32()),
        "image_tokens": pa.list_(pa.int32()),
        "image_counts": pa.list_(pa.int32()),
    }
)
SCHEMAS = {FORMAT_VERSION: PACK_SCHEMA, STOCK_FORMAT: STOCK_SCHEMA}
"""Of packs, by format version."""
IMAGE_SCHEMA = pa.schema({"data": pa.large_binary()})
_REMAKE = "pack the samples again (python -m data_prep.pack)"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of the set, as the manifest lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a set of shards holds and what it was made with.

    tokenizer_fingerprint, template, visual_tokens and pack_length must agree with the model that trains on it;
    visual_tokens is 0 where they depend on an image's size.
    `lost` is what the vocabulary loses of the samples' texts (`vltrain.data.text.spelling`), None and not written where
    that is nothing.
    `over_long` counts the samples left out because they do not fit into a pack; over_long.jsonl lists them.
    `mixture` is of several sets (`vltrain.data.stream.mixed`), None and not written elsewhere.
    """

    tokenizer_fingerprint: str
    tokenizer: str
    template: str
    visual_tokens: int
    pack_length: int
    max_images: int | None
    seed: int
    num_packs: int
    num_samples: int
    num_images: int
    num_tokens: int
    num_label_tokens: int
    over_long: int
    files: tuple[ShardFile, ...]
    format_version: int = FORMAT_VERSION
    lost: dict[str, Any] | None = None
    mixture: dict[str, Any] | None = None

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens."""
        return self.num_tokens / (self.num_packs * self.pack_length)

    @property
    def checksum(self) -> str:
        """SHA-256 (hex) of all the above: two sets with the same one hold the same packs."""
        return _checksum(self._fields())

    def dumps(self) -> str:
        return json.dumps({**self._fields(), "checksum": self.checksum}, indent=1) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = {**vars(self), "files": [vars(file) for file in self.files]}
        return {name: value for name, value in fields.items() if value is not None or name not in ("lost", "mixture")}


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `folder/manifest.json`.

    Raises:
        InputError: no such file, not JSON, changed since it was written, or of another format version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: not a folder of packed shards (it has no {MANIFEST})")
    try:
        text = read_text(path, "a manifest")
    except InputError as error:
        raise InputError(f"{error}; {_REMAKE}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: str, path: str) -> Manifest:
    """The same, of its text. `path`: as messages call it."""
    try:
        fields = parse_json(text.encode(), path)
    except InputError as error:
        raise InputError(f"{error}; {_REMAKE}") from None
    found = fields.pop("checksum", None) if is_object(fields) else None
    if found is None or found != _checksum(fields):
        raise InputError(
            f"{path}: its checksum is {found}, expected the one of its content: it was changed or damaged; {_REMAKE}"
        )
    if fields.get("format_version") not in SCHEMAS:
        known = " and ".join(map(str, SCHEMAS))
        raise InputError(
            f"{path}: format version {fields.get('format_version')}, this program reads {known}; {_REMAKE}"
        )
    try:
        fields["files"] = tuple(ShardFile(**file) for file in fields["files"])
        manifest = Manifest(**fields)
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a manifest of packed shards ({error}); {_REMAKE}") from None
    strange = [file.name for file in manifest.files if not FILE_NAME.fullmatch(file.name)]
    if strange:
        raise InputError(f"{path}: lists {strange[0]!r}, expected files of its own folder; do not use it")
    if text != manifest.dumps():
        raise InputError(f"{path}: its text is not as it was written: the file is damaged; {_REMAKE}")
    return manifest


def require_match(
    manifest: Manifest, tokenizer_fingerprint: str, visual_tokens: int, template: str, pack_length: int
) -> None:
    """InputError, with every difference, if the shards were packed for another model or recipe than the one given."""
    expected = {
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "visual_tokens": visual_tokens,
        "template": template,
        "pack_length": pack_length,
    }
    differences = [
        f"{name} is {getattr(manifest, name)!r}, the recipe's model needs {value!r}"
        for name, value in expected.items()
        if getattr(manifest, name) != value
    ]
    if differences:
        raise InputError(
            f"the shards were packed for another model: {'; '.join(differences)}. {_REMAKE[0].upper() + _REMAKE[1:]}"
        )


class PackedDataset:
    """A folder of packed shards, here or at an address (`vltrain.data.remote`). Picklable: a worker process that gets
    one opens the files anew, if they are still those that were opened.

    place   as the user names the folder
    folder  where manifest, index and record are: `place`, or what was fetched of it
    """

    def __init__(self, place: Path | str, verify: bool = True, cache: CacheSettings | None = None) -> None:
        """Opens a folder.

        Args:
            verify: read every file and compare its SHA-256 with the manifest; else only sizes are compared. At an
                address blocks are compared when they come, and here only whether every file is there in its size.
            cache: of blocks of an address; None: the user's.

        Raises:
            InputError: not a set of shards, or a file that is missing, truncated or changed.
        """
        self.place = str(place)
        self._remote = RemotePacks(self.place, cache or CacheSettings()) if is_address(place) else None
        self._stamps: dict[str, Stamp] = {}
        if self._remote is not None:
            self.manifest, self.folder = self._open_remote(self._remote, verify)
        else:
            self.folder = Path(place)
            self.manifest = read_manifest(self.folder)
            if verify:
                require_whole_record(self.folder)
            self._stamps = {file.name: self._check(file, verify) for file in self.manifest.files}
        self._make_tables()

    def _open_remote(self, remote: RemotePacks, verify: bool) -> tuple[Manifest, Path]:
        manifest, text = remote.manifest(MANIFEST, parse_manifest)
        index = next((file for file in manifest.files if file.name == INDEX), None)
        if index is None:
            raise InputError(
                f"{self.place}: found a mixture's folder, expected packs of one set; name the address of each set "
                "(data.mixture.SET.train_packs)"
            )
        head = remote.fetch_head(manifest.checksum, (MANIFEST, text), (MADE_FROM, read_made_from), index)
        if verify:
            shards = [file for file in manifest.files if file.name.startswith(("packs-", "images-"))]
            remote.require_whole(shards, _local_ranks())
        return manifest, head.folder

    def _make_tables(self) -> None:
        packs, images = self._files("packs-"), self._files("images-")
        if self._remote is None:
            self._packs, self._images = (
                MappedTable(self.folder, {file.name: file.rows for file in files}, self._stamps, ROWS_PER_BATCH)
                for files in (packs, images)
            )
        else:
            schema = SCHEMAS[self.manifest.format_version]
            self._packs = self._remote.table(packs, schema, ROWS_PER_BATCH)
            self._images = self._remote.table(images, IMAGE_SCHEMA, ROWS_PER_BATCH)

    def damaged(self) -> list[str]:
        """Of packs at an address, what reading every byte of every file finds, a line for each that is damaged; those
        that are here were read when they were opened."""
        return [] if self._remote is None else list(self._remote.damaged(self.manifest.files))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where its shards, or some of a mixture's sets, are; none where they are here."""
        return () if self._remote is None else (self.place,)

    @property
    def is_remote(self) -> bool:
        """Whether some of its shards are at an address."""
        return bool(self.addresses)

    @property
    def cache(self) -> CacheSettings | None:
        """Of what is at an address; None where it is here."""
        return None if self._remote is None else self._remote.settings

    @contextmanager
    def fetched_ahead(self, packs: Iterator[int]) -> Generator[Callable[[int], None]]:
        """Inside the block packs are fetched in the order in which they will be used. Gives what is to be told how many
        more of them have been."""
        if self.cache is None:
            yield lambda number: None
            return
        share = self.cache.max_bytes // (2 * _local_ranks())
        ahead = Ahead(packs, pickle.loads(pickle.dumps(self)).keep, share)
        try:
            yield ahead.used
        finally:
            ahead.close()

    def keep(self, number: int) -> int:
        """Fetches pack `number` with its images into the cache. Returns the bytes of the blocks that hold it."""
        if not isinstance(self._packs, RemoteTable) or not isinstance(self._images, RemoteTable):
            return 0
        kept = self._packs.keep(number)
        return kept + sum(map(self._images.keep_image, self.row(number).image_ids.tolist()))

    def _files(self, prefix: str) -> list[ShardFile]:
        return [file for file in self.manifest.files if file.name.startswith(prefix)]

    def _check(self, file: ShardFile, verify: bool) -> Stamp:
        path = self.folder / file.name
        try:
            size, _ = stamp = stamp_of(path)
            if size != file.bytes:
                raise InputError(f"{path}: {size} bytes, the manifest says {file.bytes}; {_REMAKE}")
            if verify:
                found = sha256_of(path)
                if found != file.sha256:
                    raise InputError(
                        f"{path}: SHA-256 is {found}, the manifest says {file.sha256}: the file is damaged; {_REMAKE}"
                    )
            return stamp
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}), the manifest lists it; {_REMAKE}") from None

    def __len__(self) -> int:
        return self.manifest.num_packs

    @functools.cached_property
    def index(self) -> Index:
        if self._remote is None:
            require_opened(self.folder / INDEX, self._stamps[INDEX])
        return read_index(self.folder / INDEX)

    def row(self, number: int) -> PackedRow:
        """Pack `number`; its arrays are read-only views of the mapped file."""
        batch, place = self._packs.find(number)
        values = {name: batch.column(name)[place].values for name in SCHEMAS[self.manifest.format_version].names}
        row = PackedRow(
            sample_ids=tuple(values.pop("sample_ids").to_pylist()),
            loss_mask=values.pop("loss_mask").to_numpy(zero_copy_only=False),
            **{name: value.to_numpy(zero_copy_only=True) for name, value in values.items()},
        )
        if self.manifest.format_version == FORMAT_VERSION:
            return row
        positions = row.position_ids
        shape = (-1, len(row.input_ids)) if len(positions) else (0, 0)
        return replace(row, position_ids=positions.reshape(shape))

    def image_tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Visual tokens of the distinct images of packs, and their squares, each summed over a pack: int64 [m]. Of
        packs that do not say (all but a stock model's) zeros."""
        sums = np.zeros((2, len(numbers)), np.int64)
        if self.manifest.format_version == STOCK_FORMAT:
            for place, number in enumerate(numbers.tolist()):
                batch, row = self._packs.find(number)
                tokens = batch.column("image_tokens")[row].values.to_numpy().astype(np.int64)
                sums[:, place] = tokens.sum(), (tokens**2).sum()
        return sums[0], sums[1]

    def images_of_size(self, size: ImageSize, numbers: np.ndarray) -> np.ndarray:
        """How many images of `size` cost as much as those of each pack, float64 [m]."""
        return size.images(self.index.num_images[numbers], *self.image_tokens(numbers))

    def sample_ids(self, number: int) -> tuple[str, ...]:
        """Ids of the samples in pack `number`."""
        batch, place = self._packs.find(number)
        return tuple(batch.column("sample_ids")[place].as_py())

    def image(self, image_id: int) -> bytes:
        """The file bytes of an image."""
        if isinstance(self._images, RemoteTable):
            return self._images.image(image_id)
        batch, place = self._images.find(image_id)
        return batch.column("data")[place].as_py()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("place", "folder", "manifest", "_stamps", "_remote")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_tables()


def _local_ranks() -> int:
    from vltrain.distributed.machine import local_world_size  # with torch, which preparing data does without

    return local_world_size()
