"""`blocks.index`: digests of the blocks that shards are fetched in, and where in them rows lie, so that a pack is read
without the rest of its file.

    64 bytes     magic, length of what follows (uint64), its SHA-256
    Arrow file   a row per file of packs or images; its metadata names the manifest's checksum and the blocks' size

It follows from the shards alone and is no part of what they are known by: the manifest does not list it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vltrain.errors import InputError

BLOCKS = "blocks.index"
BLOCK_BYTES = 256 << 10
"""Images of a pack lie anywhere, so a block is about what one of them takes."""
HEAD_BYTES = 64
_MAGIC = b"VLBLOCK1"
_HEAD = struct.Struct("<8sQ32s16x")
_MANIFEST, _SIZE = b"manifest", b"block_bytes"
_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "digests": pa.list_(pa.binary(32)),  # SHA-256 of each block; the last is shorter
        "starts": pa.list_(pa.int64()),  # of each record batch's message
        "ends": pa.list_(pa.int64()),
        "offsets": pa.list_(pa.int64()),  # of images: where in the file a batch's offsets lie, int64 each,
        "data": pa.list_(pa.int64()),  # and the bytes that they count from
    }
)


@dataclass(frozen=True, kw_only=True)
class FileBlocks:
    """One file. digests: S32 [blocks], as bytes; the rest int64 [record batches], `offsets` and `data` of images only,
    else [0]."""

    digests: pa.Array
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    data: np.ndarray


def write_blocks(folder: Path, names: Sequence[str], manifest: str, block_bytes: int = BLOCK_BYTES) -> Path:
    """Writes the index of a folder's shards.

    Args:
        names: of its files of packs and images.
        manifest: checksum of its manifest.
    """
    return write_index(folder, [_describe(folder / name, block_bytes) for name in names], manifest, block_bytes)


def write_index(folder: Path, rows: Sequence[Mapping[str, object]], manifest: str, block_bytes: int) -> Path:
    """The same, of what is known of the files: `_SCHEMA`'s columns."""
    schema = _SCHEMA.with_metadata({_MANIFEST: manifest.encode(), _SIZE: str(block_bytes).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        file.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    content = sink.getvalue().to_pybytes()
    head = _HEAD.pack(_MAGIC, len(content), hashlib.sha256(content).digest())
    path = folder / BLOCKS
    path.write_bytes(head + content)
    return path


def _describe(path: Path, block_bytes: int) -> dict[str, object]:
    with path.open("rb") as file:
        digests = [hashlib.sha256(block).digest() for block in iter(lambda: file.read(block_bytes), b"")]
    whole = pa.memory_map(str(path)).read_buffer()
    stream = pa.BufferReader(whole)
    stream.seek(8)  # behind the magic of Arrow's file format
    pa.ipc.read_message(stream)  # the schema
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    found: dict[str, list[int]] = {"starts": [], "ends": [], "offsets": [], "data": []}
    for number in range(reader.num_record_batches):
        found["starts"].append(stream.tell())
        pa.ipc.read_message(stream)
        found["ends"].append(stream.tell())
        if reader.schema.names == ["data"]:
            _, offsets, data = reader.get_batch(number).column(0).buffers()
            found["offsets"].append(offsets.address - whole.address)
            found["data"].append(data.address - whole.address)
    return {"name": path.name, "digests": digests, **found}


def length_of(head: bytes, where: str) -> int:
    """Bytes of the whole index, by its first `HEAD_BYTES`. Raises InputError for something else."""
    if len(head) != HEAD_BYTES or not head.startswith(_MAGIC):
        raise InputError(f"{where}: not an index of blocks; pack the samples again (python -m data_prep.pack)")
    return HEAD_BYTES + _HEAD.unpack(head)[1]


def is_whole(content: bytes) -> bool:
    """Whether its own digest fits."""
    if len(content) < HEAD_BYTES or not content.startswith(_MAGIC):
        return False
    _, length, digest = _HEAD.unpack(content[:HEAD_BYTES])
    return len(content) == HEAD_BYTES + length and hashlib.sha256(content[HEAD_BYTES:]).digest() == digest


def misfits(folder: Path, names: Sequence[str], manifest: str) -> list[str]:
    """What is wrong with the index of a folder, of whose files `names` every byte is read; arguments as of
    `write_blocks`."""
    path = folder / BLOCKS
    remedy = "pack the samples again, or copy it from where it is whole"
    if not is_whole(path.read_bytes()):
        return [f"{path}: changed or damaged; {remedy}"]
    size, found = read_blocks(path, manifest, str(path))
    if sorted(found) != sorted(names):
        return [f"{path}: is of {', '.join(sorted(found))}, found {', '.join(sorted(names))}; {remedy}"]
    return [f"{path}: does not fit {name}; {remedy}" for name in names if not _fits(found[name], folder / name, size)]


def _fits(found: FileBlocks, path: Path, block_bytes: int) -> bool:
    made = _describe(path, block_bytes)
    numbers = all(getattr(found, name).tolist() == made[name] for name in ("starts", "ends", "offsets", "data"))
    return numbers and found.digests.to_pylist() == made["digests"]


def read_blocks(path: Path, manifest: str, where: str) -> tuple[int, dict[str, FileBlocks]]:
    """(bytes of a block, each file's blocks by its name), memory-mapped. Raises InputError if it is of other packs than
    those of the manifest with that checksum."""
    mapped = pa.memory_map(str(path)).read_buffer()
    batch = pa.ipc.open_file(pa.BufferReader(mapped.slice(HEAD_BYTES))).get_batch(0)
    metadata = batch.schema.metadata
    if metadata[_MANIFEST].decode() != manifest:
        raise InputError(f"{where}: is of other packs than the manifest beside it; copy the folder anew, as a whole")
    columns = {name: batch.column(name) for name in _SCHEMA.names}
    found = {
        columns["name"][row].as_py(): FileBlocks(
            digests=columns["digests"][row].values,
            **{name: columns[name][row].values.to_numpy() for name in ("starts", "ends", "offsets", "data")},
        )
        for row in range(batch.num_rows)
    }
    return int(metadata[_SIZE]), found
