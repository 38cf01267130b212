"""Writes a folder of packed shards (layout: `vltrain.data.shards`), row by row, and gives it its name only when it is
whole."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vltrain.data.flat.columns import Column
from vltrain.data.flat.index import INDEX_SCHEMA
from vltrain.data.folder import new_folder
from vltrain.data.remote.blocks import write_blocks
from vltrain.data.shards import (
    FORMAT_VERSION,
    IMAGE_SCHEMA,
    INDEX,
    MANIFEST,
    ROWS_PER_BATCH,
    SCHEMAS,
    STOCK_FORMAT,
    Manifest,
    ShardFile,
)
from vltrain.files.digest import sha256_of
from vltrain.schema import PackedRow

FILE_BYTES = 256 << 20  # a new file is begun when one has grown to this


@contextmanager
def write_shards(
    output: Path, file_bytes: int = FILE_BYTES, *, replace: bool = False, version: int = FORMAT_VERSION
) -> Generator[ShardWriter]:
    """Gives a writer; the folder `output` exists once the block has ended without an error and the writer was finished,
    with `replace` in the place of an older one. `version`: a key of `SCHEMAS`.

    Raises:
        InputError: `output` exists or cannot be written.
    """
    with new_folder(output, replace=replace) as folder:
        writer = ShardWriter(folder, file_bytes, version)
        try:
            yield writer
        finally:
            writer.close()
        assert (folder / MANIFEST).exists(), "finish() was not called"


class ShardWriter:
    """Takes images and packs in any order of calls; `finish` writes index and manifest."""

    def __init__(self, folder: Path, file_bytes: int, version: int) -> None:
        self.folder, self._version = folder, version
        self._packs = _Files(folder, "packs", SCHEMAS[version], file_bytes)
        self._images = _Files(folder, "images", IMAGE_SCHEMA, file_bytes)
        self._index = {
            field.name: Column(folder, np.int64 if field.type == pa.int64() else np.int32) for field in INDEX_SCHEMA
        }
        self._index_rows: list[tuple[int, ...]] = []
        self._image_ids: dict[bytes, int] = {}

    def add_image(self, data: bytes) -> int:
        """Stores an image file's bytes, once if they come again, and gives the number by which packs refer to them."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._image_ids:
            self._image_ids[digest] = len(self._image_ids)
            self._images.add((data,), len(data))
        return self._image_ids[digest]

    def add_row(self, row: PackedRow) -> None:
        """Appends a pack; its `image_ids` are what `add_image` gave."""
        lengths = row.segment_lengths.astype(np.int64)
        assert lengths.sum() == len(row.input_ids) == len(row.loss_mask)
        values = {name: getattr(row, name) for name in SCHEMAS[self._version].names}
        if self._version == STOCK_FORMAT:
            values["position_ids"] = row.position_ids.reshape(-1)
        num_bytes = 4 * (len(row.input_ids) + row.position_ids.size + len(row.blocks))
        self._packs.add(tuple(values.values()), num_bytes)
        facts = (len(row.input_ids), row.loss_mask.sum(), len(row.image_ids), len(lengths), (lengths**2).sum())
        self._index_rows.append(tuple(map(int, facts)))
        if len(self._index_rows) == ROWS_PER_BATCH:
            self._write_index_rows()

    def _write_index_rows(self) -> None:
        for column, values in zip(self._index.values(), zip(*self._index_rows)):
            column.extend(values)
        self._index_rows.clear()

    def finish(self, extra_files: tuple[ShardFile, ...] = (), **facts: Any) -> Manifest:
        """Writes the index and the manifest.

        Args:
            extra_files: further files that the caller put into the folder.
            facts: the fields of Manifest that the writer cannot know.
        """
        self._write_index_rows()
        index = {name: column.values() for name, column in self._index.items()}
        # one batch, so that each column maps as one array
        with pa.ipc.new_file(str(self.folder / INDEX), INDEX_SCHEMA) as file:
            file.write_batch(
                pa.record_batch(
                    [pa.array(index[field.name], field.type) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA
                )
            )
        num_packs = len(index["num_tokens"])
        totals = {
            name: int(index[name].sum(dtype=np.int64)) for name in ("num_samples", "num_tokens", "num_label_tokens")
        }
        files = (describe(self.folder / INDEX, num_packs), *self._packs.close(), *self._images.close(), *extra_files)
        told: dict[str, Any] = {**totals, **facts, "format_version": self._version}
        manifest = Manifest(num_packs=num_packs, num_images=len(self._image_ids), files=files, **told)
        (self.folder / MANIFEST).write_text(manifest.dumps(), encoding="utf-8")
        shards = [file.name for file in files if file.name.startswith(("packs-", "images-"))]
        write_blocks(self.folder, shards, manifest.checksum)
        return manifest

    def close(self) -> None:
        self._packs.close()
        self._images.close()
        for column in self._index.values():
            column.close()


class _Files:
    """Rows of one schema, written to numbered files of full record batches; only the last batch of all may be short."""

    def __init__(self, folder: Path, prefix: str, schema: pa.Schema, file_bytes: int) -> None:
        self._folder, self._prefix, self._schema, self._file_bytes = folder, prefix, schema, file_bytes
        self._pending: list[tuple[Any, ...]] = []
        self._writer: pa.RecordBatchFileWriter | None = None
        self._rows = self._bytes = 0
        self._done: list[ShardFile] = []

    def add(self, row: tuple[Any, ...], num_bytes: int) -> None:
        """Appends a row, a value per column; `num_bytes` is about what it will take."""
        self._pending.append(row)
        self._bytes += num_bytes
        if len(self._pending) == ROWS_PER_BATCH:
            self._flush()
            if self._bytes >= self._file_bytes:
                self._end_file()

    def close(self) -> tuple[ShardFile, ...]:
        """Writes what is pending and gives the files written."""
        if self._pending:
            self._flush()
        self._end_file()
        return tuple(self._done)

    def _flush(self) -> None:
        columns = [
            _column(values, field.type)
            for values, field in zip(zip(*self._pending, strict=True), self._schema, strict=True)
        ]
        if self._writer is None:
            self._path = self._folder / f"{self._prefix}-{len(self._done):05d}.arrow"
            self._writer = pa.ipc.new_file(str(self._path), self._schema)
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows += len(self._pending)
        self._pending.clear()

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._done.append(describe(self._path, self._rows))
            self._writer, self._rows, self._bytes = None, 0, 0


def _column(values: tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    """Arrow's array of that type; of lists by their numbers all at once, since one by one takes ten times as long."""
    if not pa.types.is_list(kind) or pa.types.is_string(kind.value_type):
        return pa.array(values, kind)
    starts = np.cumsum([0, *map(len, values)], dtype=np.int32)
    numbers: np.ndarray = np.concatenate(values)
    return pa.ListArray.from_arrays(starts, pa.array(numbers, kind.value_type), type=kind)


def describe(path: Path, rows: int) -> ShardFile:
    """The manifest's entry for a finished file."""
    return ShardFile(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256_of(path))
