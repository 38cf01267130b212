"""Features of the images of packed shards, kept on disk beside the packs that show them.

    PACKS/features-KEY/part-NNNNNN.safetensors  of PART_IMAGES images: their rows, and how many each of them has
                       index.safetensors        of all images: which it is, of which count, how many rows it has
                       features.json            the key in full, bytes and digest of all files; written last

KEY is a digest of what the features depend on, so another tower, processor or precision has a folder of its own, and
runs that differ elsewhere share one. A part appears whole or not at all, and says which key it is of; whoever is killed
leaves whole parts behind, and the next one makes the others. Which images share a part and are computed together
follows from their numbers alone. Trade-off: no compression, and a part's features are in memory until it is written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vltrain.batch import ImageFeatures, tensor_of
from vltrain.data.shards import STOCK_FORMAT, PackedDataset
from vltrain.errors import InputError
from vltrain.files.atomic import renamed_when_written, sync, write_json
from vltrain.files.digest import file_digests
from vltrain.files.leftovers import remove
from vltrain.files.strict_json import is_object, parse_json, read_json
from vltrain.files.tensors import save_file
from vltrain.schema import PackedRow

PART_IMAGES, CHUNK_IMAGES = 64, 8
"""Images of a file, and of those that are computed together."""
INDEX, MANIFEST = "index.safetensors", "features.json"
_SAID = "vltrain"  # in a part's metadata; one entry, since safetensors writes several in any order
_COUNT_SHIFT = 48  # an image's number is below 2 ** 48


@dataclass(frozen=True)
class Entries:
    """Whose features are kept: an image for each count (see `PackedRow.image_counts`) with which it is shown, in
    ascending order of both.

    image_ids, counts  int64 [E]
    tokens             int64 [E], rows that each must have; None: not known
    chunk_images       of those that are computed together
    """

    image_ids: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray | None
    chunk_images: int

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_parts(self) -> int:
        return -(-len(self) // PART_IMAGES)

    def chunks(self, part: int) -> list[range]:
        """The entries of a part that are computed together."""
        end = min(len(self), (part + 1) * PART_IMAGES)
        starts = range(part * PART_IMAGES, end, self.chunk_images)
        return [range(start, min(start + self.chunk_images, end)) for start in starts]


def entries_of(dataset: PackedDataset) -> Entries:
    """All that the packs show. Of a stock model every pack with images is read."""
    chunk = min(CHUNK_IMAGES, dataset.manifest.max_images or CHUNK_IMAGES)
    if dataset.manifest.format_version != STOCK_FORMAT:
        ids = np.arange(dataset.manifest.num_images, dtype=np.int64)
        return Entries(ids, np.ones(len(ids), np.int64), None, chunk)
    tokens: dict[int, int] = {}
    for number in np.flatnonzero(dataset.index.num_images[:] > 0).tolist():
        row = dataset.row(number)
        tokens.update(zip(_keys(row.image_ids, row.image_counts).tolist(), row.image_tokens.tolist(), strict=True))
    keys = np.array(sorted(tokens), np.int64)
    found = np.array([tokens[key] for key in keys.tolist()], np.int64)
    return Entries(keys & ((1 << _COUNT_SHIFT) - 1), keys >> _COUNT_SHIFT, found, chunk)


def _keys(image_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One number for each pair, ascending with the count first. `counts` [0]: all are 1."""
    ids = image_ids.astype(np.int64)
    return ids + ((counts.astype(np.int64) if len(counts) else np.ones_like(ids)) << _COUNT_SHIFT)


class FeatureStore:
    """The folder of one key.

    Args:
        packs: whose images they are of.
        facts: what the features depend on, plain JSON.
    """

    def __init__(self, packs: Path, facts: Mapping[str, Any]) -> None:
        self.facts = json.loads(json.dumps(facts, default=str))
        self.key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self.folder = packs / f"features-{self.key[:12]}"

    @property
    def is_complete(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def missing(self, entries: Entries) -> list[int]:
        """Parts that are not there yet, or are of another key or cut short. For the folder's only writer: what killed
        processes had begun is removed."""
        for leftover in self.folder.glob(".*.tmp"):
            remove(leftover)
        return [part for part in range(entries.num_parts) if not self._is_whole(part)]

    def _is_whole(self, part: int) -> bool:
        try:
            with _mapped(_part(self.folder, part)) as file:
                said: dict[str, str] = file.metadata() or {}
                found = parse_json(said.get(_SAID, "{}").encode(), str(_part(self.folder, part)))
                return is_object(found) and found.get("key") == self.key
        except (SafetensorError, OSError, InputError):
            return False

    def require_room(self, num_bytes: int) -> None:
        """Raises InputError unless so much fits on the disk."""
        try:
            self.folder.mkdir(exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(
                f"train.keep_image_features: {self.folder} cannot be written ({error.strerror}); pack into a folder "
                "that can be written (data.root, data.train_packs), or leave it out"
            ) from None
        if free < num_bytes:
            raise InputError(
                f"train.keep_image_features: the features take {num_bytes / 2**30:.2f} GiB in {self.folder}, where "
                f"{free / 2**30:.2f} GiB are free; make room, move the packs, or leave it out"
            )

    def write(self, part: int, made: Sequence[ImageFeatures]) -> None:
        """The features of a part's chunks, on the CPU. Raises InputError where that is not possible."""
        path = _part(self.folder, part)
        tensors = {name: torch.cat([getattr(one, name) for one in made]) for name in ("rows", "lengths")}
        try:
            with renamed_when_written(path, clears=False) as beside:
                save_file(tensors, beside, {_SAID: json.dumps({"key": self.key, "form": made[0].form})})
                sync(beside)
        except OSError as error:
            raise InputError(
                f"train.keep_image_features: {path} could not be written ({error.strerror or error}); make room, or "
                "leave it out; whole files stay and are used by the next run"
            ) from None

    def finish(self, entries: Entries) -> None:
        """Says that all parts are there. Raises InputError where that is not possible."""
        lengths: list[torch.Tensor] = []
        form: Any = None
        for part in range(entries.num_parts):
            with _mapped(_part(self.folder, part)) as file:
                lengths.append(file.get_tensor("lengths"))
                form = parse_json(file.metadata()[_SAID].encode(), str(_part(self.folder, part)))["form"]
        index = {
            "image_ids": tensor_of(entries.image_ids),
            "counts": tensor_of(entries.counts),
            "lengths": torch.cat(lengths),
        }
        try:
            with renamed_when_written(self.folder / INDEX) as beside:
                save_file(index, beside)
                sync(beside)
            paths = [self.folder / INDEX, *(_part(self.folder, part) for part in range(entries.num_parts))]
            digests = file_digests(paths, algorithm="xxh3_128")
            files = [
                {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": digest}
                for path, digest in zip(paths, digests, strict=True)
            ]
        except OSError as error:
            raise InputError(f"{self.folder}: could not be written ({error.strerror or error})") from None
        facts = {"key": self.key, "facts": self.facts, "form": form, "files": files}
        write_json(self.folder / MANIFEST, facts)

    def open(self, *, verify: bool) -> KeptImages:
        """What reads them. `verify`: read every file whose digest is not known, and compare it.

        Raises: InputError for a file that is missing, cut short or changed.
        """
        found = read_json(self.folder / MANIFEST)
        remake = f"remove {self.folder}, and the next run makes it anew"
        if not is_object(found) or found.get("key") != self.key or not isinstance(found.get("files"), list):
            raise InputError(f"{self.folder / MANIFEST}: is not of these features; {remake}")
        paths: list[Path] = []
        for file in found["files"]:
            paths.append(path := self.folder / str(file["name"]))
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                told = "missing" if size is None else f"{size} bytes"
                raise InputError(f"{path}: {told}, {MANIFEST} says {file['bytes']} bytes; {remake}")
        for path, file, digest in zip(
            paths, found["files"], file_digests(paths, algorithm="xxh3_128") if verify else (), strict=False
        ):
            if digest != file["xxh3_128"]:
                raise InputError(f"{path}: its content is not what was written: the file is damaged; {remake}")
        return KeptImages(self.folder, found.get("form"))


def _mapped(path: Path) -> Any:
    """A safetensors file, of whose package the type checker knows nothing. Raises OSError and SafetensorError."""
    opened: Any = safe_open
    return opened(path, "pt")


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.safetensors"


class KeptImages:
    """The features of a folder, mapped. Picklable: a worker process that gets one maps the files anew."""

    def __init__(self, folder: Path, form: Any) -> None:
        self.folder, self.form = folder, form
        with _mapped(folder / INDEX) as file:
            image_ids, counts, lengths = (file.get_tensor(name).numpy() for name in ("image_ids", "counts", "lengths"))
        self._keys, self._lengths = _keys(image_ids, counts), np.asarray(lengths)
        starts = np.cumsum(self._lengths) - self._lengths
        self._starts = starts - starts[np.arange(len(starts)) // PART_IMAGES * PART_IMAGES]  # within their parts
        self._map()

    def _map(self) -> None:
        # Mapped files cost address space and a file handle each, so only the last used stay open.
        self._open = functools.lru_cache(maxsize=64)(self._slices)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def num_bytes(self) -> int:
        rows = self._open(0)
        width: int = math.prod(rows.get_shape()[1:]) * rows[:1].element_size()
        return int(self._lengths.sum()) * width

    def _slices(self, part: int) -> Any:
        path = _part(self.folder, part)
        try:
            return _mapped(path).get_slice("rows")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}), though it was there when the run began; start again"
            ) from None

    def of(self, entries: Sequence[int]) -> ImageFeatures:
        """The features of entries, by their numbers; of none, rows of the right width and dtype."""
        rows = [self._open(number // PART_IMAGES)[self._starts[number] : self._starts[number] + self._lengths[number]]
                for number in entries]  # fmt: skip
        joined = torch.cat(rows) if rows else self._open(0)[:0]
        return ImageFeatures(rows=joined, lengths=tensor_of(self._lengths[list(entries)]), form=self.form)

    def of_row(self, row: PackedRow, *, blank: bool, where: str) -> ImageFeatures:
        """Those of a row's distinct images. `blank`: if it shows none, those of some image, which no slot refers to.

        Raises: InputError where one has another number of rows than it has tokens in the row.
        """
        if len(row.image_ids) == 0:
            return self.of([0] if blank else [])
        keys = _keys(row.image_ids, row.image_counts)
        places = np.searchsorted(self._keys, keys)
        assert np.array_equal(self._keys[places.clip(max=len(self._keys) - 1)], keys), "an image of other packs"
        features = self.of(places.tolist())
        found = self._lengths[places].tolist()
        if len(row.image_tokens) and found != row.image_tokens.tolist():
            raise InputError(
                f"{where}: the features of its images have {found} rows, but {row.image_tokens.tolist()} tokens stand "
                f"for them; remove {self.folder}, and the next run makes it anew"
            )
        return features
