"""Opens a data set by the `datasets` library, without reading more of it than its columns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.reading import note_read
from data_prep.sources.streamed.faults import fetch_first, hush, one_line_errors
from data_prep.sources.streamed.rows import require_whole_files, rows_of_files
from vltrain.errors import InputError, nearest
from vltrain.files.hub import why_silent
from vltrain.files.strict_json import is_list, is_object

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

SUFFIXES = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset",
    ".arrow": "arrow",
}
"""Formats of single files."""
FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")
"""Those that are read; the library knows more, of which some hold code."""
UNTYPED = ("json", "webdataset")
"""Whose values stay as they are written: the library makes all rows alike, by turning what differs into text."""
LOOKED_AT = 100
_PACKAGE = "datasets.packaged_modules."


@dataclass(frozen=True)
class Opened:
    """A data set that can be read.

    where    how an error names it
    root     the local folder or file, None of the Hub's
    address  of the Hub's, where its files are: hf://datasets/NAME@COMMIT
    splits   its splits by their own names, each with its stream (none of JSON) and its files (absolute, or below
             `address`)
    facts    what is recorded of it
    """

    where: str
    root: Path | None
    address: str | None
    format: str
    splits: Mapping[str, tuple[IterableDataset | None, list[str]]]
    facts: dict[str, str | None]

    def columns(self, split: str) -> dict[str, Any]:
        """The columns of a split, each with its feature; None as the feature where only rows can tell, of which the
        first are looked at."""
        stream, _ = self.splits[split]
        if stream is None or self.format in UNTYPED:
            found: dict[str, Any] = {}
            for _, row in islice(self.rows(split), LOOKED_AT):
                _note_fields(found, row)
            return found
        return dict(stream.features or {})

    def rows(self, split: str, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row of a split in the order of its files, with where it stands. `columns`: the only ones that are
        wanted. Raises InputError for a file that is damaged, and for a split without rows."""
        stream, files = self.splits[split]
        if stream is not None and columns is not None and self.format not in UNTYPED:
            stream = stream.select_columns(columns)
        is_empty = True
        for one in rows_of_files(self.format, stream, files, f"{self.where}: split '{split}'"):
            is_empty = False
            yield one
        if is_empty:
            raise InputError(f"{self.where}: split '{split}' has no rows, expected one at least")


def _note_fields(found: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds a row's columns, and of those that hold objects the fields."""
    for name, value in row.items():
        if is_object(value):
            found[name] = found.get(name) or {}
            _note_fields(found[name], value)
        else:
            found.setdefault(name, None)


def open_local(place: Path, format: str | None, config: str | None) -> Opened:
    """A file or folder. Raises InputError for one that is not there, is empty, has no data in it that is read here, or
    is damaged."""
    root = Path(os.path.abspath(place))
    if not root.exists():
        raise InputError(f"{place}: no such file or folder; expected a data set: {', '.join(SUFFIXES)}, or a folder")
    where = str(place)
    arguments: dict[str, Any] = {}
    if root.is_dir():
        path = format or str(root)
        arguments = {"data_dir": str(root)} if format else {}
    else:
        path = format or SUFFIXES.get(root.suffix.lower(), "")
        if not path:
            raise InputError(f"{place}: found no known ending; expected {', '.join(SUFFIXES)}, or the option format=")
        arguments = {"data_files": {"train": [str(root)]}, **({"sep": "\t"} if root.suffix == ".tsv" else {})}
    with one_line_errors(where):
        from datasets import load_dataset_builder

        hush()
        builder = load_dataset_builder(path, **arguments, **({"name": config} if config else {}))
    folder = root if root.is_dir() else root.parent
    note_read(folder / "README.md")
    opened = _opened(builder, where, folder=folder, address=None, facts={"licence": _licence_of(folder)})
    if root.is_dir():  # another file in one of its folders may be one of the data set's
        for inside in {os.path.dirname(file) for _, files in opened.splits.values() for file in files}:
            note_read(inside)
    return opened


def open_hub(name: str, config: str | None, revision: str | None) -> Opened:
    """A data set of the Hub, streamed from there; where the Hub does not answer, from its cache, if it was downloaded.
    Raises InputError for one that is gated, is not there, or of which nothing can be reached."""
    where = f"hub={name}"
    silence = why_silent()
    if silence is not None:
        return _open_cached(name, config, revision, silence)
    with one_line_errors(where, hub=name):
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi

        found = HfApi().dataset_info(name, revision=revision)
        builder = load_dataset_builder(name, **({"name": config} if config else {}), revision=found.sha)
    card: Any = found.card_data
    facts = {"hub": name, "revision": found.sha, "licence": _text_of(card.get("license")) if card else None}
    return _opened(builder, where, folder=None, address=f"hf://datasets/{name}@{found.sha}", facts=facts)


def _open_cached(name: str, config: str | None, revision: str | None, silence: str) -> Opened:
    import huggingface_hub

    fetch: Any = huggingface_hub.snapshot_download  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    where = f"hub={name}"
    try:
        folder = Path(fetch(name, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception as error:  # not there, or not whole
        told = " ".join(str(error).split())[:120]
        raise InputError(
            f"{where}: not in the Hub's cache ({told}), and the Hub does not answer ({silence}); {fetch_first(name)}"
        ) from None
    with one_line_errors(where):
        from datasets import load_dataset_builder

        hush()
        builder = load_dataset_builder(str(folder), **({"name": config} if config else {}))
    facts = {"hub": name, "revision": folder.name, "licence": _licence_of(folder)}
    return _opened(builder, where, folder=folder, address=None, facts=facts)


def _opened(
    builder: DatasetBuilder, where: str, *, folder: Path | None, address: str | None, facts: dict[str, str | None]
) -> Opened:
    format = _format_of(builder)
    if format not in FORMATS:
        raise InputError(
            f"{where}: its files are of the format '{format}', which is not read; expected {', '.join(FORMATS)}"
        )
    settings: Any = builder.config
    if format == "parquet" and settings.filters is not None:
        raise InputError(
            f"{where}: its card leaves rows out (filters), which is not read here; remove that from the card"
        )
    if format == "csv":
        settings.keep_default_na = False  # the answer "None" is a text
    data_files: dict[Any, list[Any]] = settings.data_files or {}
    files = {str(split): list(map(str, listed)) for split, listed in data_files.items()}
    for listed in files.values():
        _require_below(listed, where, folder, address)
    with one_line_errors(where, hub=facts.get("hub") if address else None):
        try:
            streams = _streams(builder, format) if format != "json" else dict.fromkeys(files)
        except Exception:
            require_whole_files(format, list(chain.from_iterable(files.values())))
            raise
    splits = {name: (stream, files.get(name, [])) for name, stream in streams.items()}
    names = {split: [_relative(file, folder, address) for file in listed] for split, listed in files.items()}
    shape = {name: str(stream.features) for name, stream in streams.items() if stream is not None}
    facts = {**facts, "config": settings.name, "format": format}
    fingerprint = hashlib.sha256(json.dumps([facts, names, shape], sort_keys=True).encode()).hexdigest()[:32]
    return Opened(where, folder, address, format, splits, {**facts, "fingerprint": fingerprint})


def _streams(builder: DatasetBuilder, format: str) -> dict[str, IterableDataset]:
    """By split, with images as they are stored."""
    streams: dict[str, IterableDataset] = {str(name): one for name, one in builder.as_streaming_dataset().items()}
    if format == "csv":
        from datasets import Features, Value

        first = next(iter(next(iter(streams.values()))))
        settings: Any = builder.config
        settings.features = builder.info.features = Features({name: Value("string") for name in first})
        return {str(name): one for name, one in builder.as_streaming_dataset().items()}
    if format in UNTYPED:
        for stream in streams.values():
            stream.info.features = None
        return streams
    return {name: stream.decode(False) if stream.features else stream for name, stream in streams.items()}


def _require_below(files: list[str], where: str, folder: Path | None, address: str | None) -> None:
    """A data set's own card says which files it has: none may be elsewhere, and none empty."""
    for file in files:
        if address is not None:
            if not file.startswith(f"{address}/"):
                raise InputError(f"{where}: its card names {file}, which is no file of its own")
            continue
        assert folder is not None
        if not Path(os.path.realpath(file)).is_relative_to(_roots_of(folder)):
            raise InputError(f"{where}: {file} leads out of {folder}; a data set may name its own files only")
        if not os.path.getsize(file):
            raise InputError(f"{file}: is empty, expected rows")
        note_read(file)


def _roots_of(folder: Path) -> Path:
    """What a file of the folder may lie below: links of the Hub's cache lead to its blobs."""
    real = Path(os.path.realpath(folder))
    return real.parents[1] if real.parent.name == "snapshots" else real


def _relative(file: str, folder: Path | None, address: str | None) -> str:
    return file.removeprefix(f"{address}/") if folder is None else os.path.relpath(file, folder)


def _format_of(builder: DatasetBuilder) -> str:
    names = (kind.__module__ for kind in type(builder).__mro__ if kind.__module__.startswith(_PACKAGE))
    return next(names, "?").removeprefix(_PACKAGE).partition(".")[0]


def _licence_of(folder: Path) -> str | None:
    """What the data set's card, README.md, says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with one_line_errors(str(card)):
        from huggingface_hub import repocard

        load: Any = repocard.metadata_load  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        known: dict[str, Any] = load(card) or {}
        return _text_of(known.get("license"))


def _text_of(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ", ".join(map(str, value)) if is_list(value) else str(value)


def require_split(opened: Opened, split: str, option: str) -> None:
    """Raises InputError for a split that is not there."""
    if split not in opened.splits:
        there = ", ".join(opened.splits)
        raise InputError(
            f"{opened.where}: has no split '{split}' ({option}=); there {'is' if len(opened.splits) == 1 else 'are'} "
            f"{there}; {nearest(split, opened.splits)}"
        )
