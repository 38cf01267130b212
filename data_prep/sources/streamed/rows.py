"""Rows of files, each with where it stands, and which file is damaged, and where.

JSON is read by the project's own reader, so that a text is a text in every row: the library takes the types of the
first rows for all, and turns what differs into text. So is parquet: the library's reader runs ahead of its taker, by a
whole file of millions of rows. Of tars it does not see that one is cut short.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.sources.streamed.faults import as_input_error, one_line_errors
from vltrain.errors import InputError
from vltrain.files.strict_json import is_blank, is_list, is_object, parse_json, parse_line, read_records, shown

if TYPE_CHECKING:
    from datasets import IterableDataset

Row = tuple[str, dict[str, Any]]
_BY_FILE = ("arrow", "csv", "webdataset")  # whose shards are their files
_RECORDS = "a JSON list of objects, or JSON Lines of them"
_BLOCK = tarfile.BLOCKSIZE
_PARQUET_ROWS = 64  # at a time, of row groups that may be a whole file
_PARQUET_BYTES = 1 << 18  # of a local column at a time; through a network each piece would be a request


def rows_of_files(format: str, stream: IterableDataset | None, files: list[str], split: str) -> Iterator[Row]:
    """The rows of a split's files, in their order. `stream`: of the library; None of JSON. `split`: how errors name it
    where a row is of no one file."""
    if stream is None:
        for file in files:
            yield from _json_rows(file)
    elif format == "parquet":
        for file in files:
            yield from _read(_parquet_rows(file, stream), file, format)
    elif format in _BY_FILE and stream.num_shards == len(files):
        for number, file in enumerate(files):
            if format == "webdataset":
                require_whole_files(format, [file])
            yield from _read(iter(stream.shard(len(files), number)), file, format)
    else:
        yield from _read(iter(stream), split, format)


def _read(rows: Iterator[dict[str, Any]], name: str, format: str) -> Iterator[Row]:
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # dozens of kinds, see `faults`
            require_whole_files(format, [name])
            place = f"{name}: cannot be read behind row {number - 1}" if number else f"{name}: cannot be read"
            raise as_input_error(error, place) from None
        if row is None:
            return
        yield f"{name}, row {number}", row
        number += 1


def _parquet_rows(file: str, stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """A file's rows, of the columns and kinds that the stream has."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.table import table_cast  # pyright: ignore[reportMissingTypeStubs]

    features: Any = stream.features
    cast: Any = table_cast
    tables: Any = pa.Table
    open_parquet: Any = pq.ParquetFile
    with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as source:
        found = open_parquet(source, buffer_size=0 if "://" in file else _PARQUET_BYTES)
        for batch in found.iter_batches(_PARQUET_ROWS, columns=list(features)):
            yield from cast(tables.from_batches([batch]), features.arrow_schema).to_pylist()


def _json_rows(file: str) -> Iterator[Row]:
    records = read_records(Path(file), _RECORDS) if "://" not in file else _remote_records(file)
    for where, record in records:
        if not is_object(record):
            raise InputError(f"{where}: found {shown(record)}, expected {_RECORDS}")
        yield where, record


def _remote_records(file: str) -> Iterator[tuple[str, Any]]:
    import fsspec

    with one_line_errors(file), fsspec.open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.lstrip()[:1] == b"[":
                listed = parse_json(line + stream.read(), file)
                if not is_list(listed):
                    raise InputError(f"{file}: found {shown(listed)}, expected {_RECORDS}")
                yield from ((f"{file}[{place}]", record) for place, record in enumerate(listed))
                return
            if not is_blank(line, number):
                yield f"{file}:{number}", parse_line(line, file, number)


def require_whole_files(format: str, files: list[str]) -> None:
    """Raises InputError for a local file of which its own structure tells that it is damaged, naming where."""
    for file in files:
        if "://" in file or not Path(file).is_file():
            continue
        if format == "parquet":
            _require_whole_parquet(file)
        if format == "webdataset" and file.endswith(".tar"):
            _require_whole_tar(file)


def _require_whole_parquet(file: str) -> None:
    import pyarrow.parquet as pq

    with one_line_errors(f"{file}: damaged, or no parquet"):
        found = pq.ParquetFile(file)
    first = 0
    for number in range(found.num_row_groups):
        last = first + found.metadata.row_group(number).num_rows - 1
        with one_line_errors(f"{file}: damaged in rows {first} to {last}"):
            for _ in found.iter_batches(64, row_groups=[number]):
                pass
        first = last + 1


def _require_whole_tar(file: str) -> None:
    """A reader of streams takes the end of a file for the end of its members: what should stand there is looked at."""
    last = "the beginning"
    with one_line_errors(f"{file}: damaged, or no tar"), open(file, "rb") as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    last = f"member {member.name!r}"
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] of millions none need be remembered
            except tarfile.TarError as error:
                raise InputError(f"{file}: damaged behind {last} ({error}); copy it again") from None
            stream.seek(tar.offset)
            end = stream.read(_BLOCK)
        if end != bytes(_BLOCK):
            raise InputError(f"{file}: cut short behind {last}: found no end of the archive; copy it again")
