"""The reader: options to splits to samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.reading import note_facts, says_itself_what_it_reads
from data_prep.sources.chats.conversations import ConversationReader
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.raw import RawSample
from data_prep.sources.splits import FRACTIONS, drawn
from data_prep.sources.streamed.cells import Cells
from data_prep.sources.streamed.columns import Rows, check_prompt, find_columns, rows_of
from data_prep.sources.streamed.fetched import Limits
from data_prep.sources.streamed.opening import FORMATS, Opened, open_hub, open_local, require_split
from vltrain.config.ranges import Range
from vltrain.errors import InputError

SOURCE = "datasets"
NONE = "none"
DEFAULTS: dict[str, Any] = {
    "hub": None,
    "config": None,
    "revision": None,
    "format": None,
    "question": None,
    "answer": None,
    "choices": None,
    "hint": None,
    "category": None,
    "id": None,
    "chat": None,
    "image": None,
    "images": None,
    "prompt": None,
    "train": "train",
    "val": None,
    "test": None,
    "val_fraction": 0.02,
    "test_fraction": 0.0,
    "unusable": "error",
    "unmarked": "error",
    "urls": "refuse",
    "url_megabytes": 20,
    "url_seconds": 20,
}
RANGES = {**FRACTIONS, "url_megabytes": Range(1, 4096), "url_seconds": Range(1, 3600)}
_CALLED = {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads a data set's splits, each in the order of its files.

    Args:
        input: a file or folder; None of a data set of the Hub.
        options: `hub`, its name there, `config` and `revision`; `format` (one of FORMATS) where the files do not tell;
            `question`, `answer`, `choices`, `hint`, `category`, `id`, `chat`: the columns; `image`: one or several,
            with commas; `images`: the folder that paths are relative to; `prompt`: with the places {hint}, {question}
            and {options} of the columns that are mapped; `train`, `val`, `test`: the data set's split for each, `none`
            for none of its own; `val_fraction` and `test_fraction`: held out by image where it has none; `unusable` and
            `unmarked` as of `llava_json`; `urls`: `refuse`, `fetch`, or `fetch_private` for addresses of this network,
            too, with at most `url_megabytes` and `url_seconds` each.

    Raises:
        InputError: no such data set, split or column; a file that is empty or damaged; a row of which no sample can be
            made, named with its file and column.
    """
    resolved = resolve_options(SOURCE, options, DEFAULTS, RANGES)
    choose(SOURCE, "unusable", resolved["unusable"], ("error", "drop"))
    choose(SOURCE, "unmarked", resolved["unmarked"], ("error", "front"))
    choose(SOURCE, "urls", resolved["urls"], ("refuse", "fetch", "fetch_private"))
    if resolved["format"] is not None:
        choose(SOURCE, "format", resolved["format"], FORMATS)
    _require_effect(input, resolved, options)
    says_itself_what_it_reads()
    opened = _open(input, resolved)
    splits = _splits(opened, resolved, options)
    readers = {split: _Split(opened, own, resolved, set()) for split, own in splits.items()}
    print(f"{opened.where}: {readers['train'].rows.columns.told()}")
    note_facts(**opened.facts)
    fractions = {name: 0.0 if name.removesuffix("_fraction") in splits else resolved[name] for name in FRACTIONS}
    yield from drawn(SOURCE, readers["train"].samples, {**resolved, **fractions}, options)
    for split in ("val", "test"):
        if split in readers:
            for raw in readers[split].samples():
                yield replace(raw, split=split)


def _require_effect(input: Path | None, resolved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises InputError for options without effect, and where there is nothing to read or two things."""
    if (input is None) == (resolved["hub"] is None):
        found = "both --input and hub=" if input is not None else "neither --input nor hub="
        raise InputError(
            f"source '{SOURCE}': found {found}, expected a file or folder (--input), or a name of the Hub "
            "(--options hub=OWNER/NAME)"
        )
    fetches: bool = resolved["urls"] != "refuse"
    pairs: dict[str, bool] = {
        "revision": resolved["hub"] is not None, "format": input is not None, "url_megabytes": fetches,
        "url_seconds": fetches,
    }  # fmt: skip
    for name, has_effect in pairs.items():
        if given.get(name) is not None and not has_effect:
            needed = {"revision": "hub=", "format": "--input"}.get(name, "urls=fetch")
            raise InputError(f"source '{SOURCE}', option '{name}': has no effect without {needed}; leave it out")


def _open(input: Path | None, resolved: Mapping[str, Any]) -> Opened:
    if input is not None:
        return open_local(input, resolved["format"], resolved["config"])
    return open_hub(resolved["hub"], resolved["config"], resolved["revision"])


def _splits(opened: Opened, resolved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """The data set's split for each of ours that it has one for."""
    found = {"train": resolved["train"]}
    require_split(opened, resolved["train"], "train")
    for split, names in _CALLED.items():
        own = resolved[split] or next((name for name in names if name in opened.splits), NONE)
        if own == NONE:
            continue
        require_split(opened, own, split)
        if given.get(f"{split}_fraction"):
            raise InputError(
                f"source '{SOURCE}', option '{split}_fraction': has no effect: split '{own}' is there; "
                f"leave it out, or say {split}=none"
            )
        found[split] = own
    if len(set(found.values())) < len(found):
        raise InputError(
            f"source '{SOURCE}': train, val and test are {', '.join(found.values())}, expected different splits"
        )
    return found


class _Split:
    """One split, whose columns are known to be there."""

    def __init__(self, opened: Opened, own: str, resolved: Mapping[str, Any], told: set[str]) -> None:
        self._opened, self._own, self._resolved, self._told = opened, own, resolved, told
        where = f"{opened.where}: split '{own}'"
        columns = find_columns(opened.columns(own), resolved, where)
        megabyte = 1 << 20
        most = int(resolved["url_megabytes"]) * megabyte
        limits = Limits(most, float(resolved["url_seconds"]), resolved["urls"] == "fetch_private")
        folder = Path(resolved["images"]) if resolved["images"] else opened.root
        address = None if resolved["images"] else opened.address
        cells = Cells(folder, address, limits if resolved["urls"] != "refuse" else None, most)
        prompt = check_prompt(SOURCE, resolved["prompt"], columns)
        self.rows = Rows(columns, cells, prompt, self._new_reader())

    def _new_reader(self) -> ConversationReader:
        return ConversationReader(self._opened.where, self._told, self._resolved["unmarked"] == "front")

    def samples(self) -> Iterator[RawSample]:
        """All of them, as of one split; each call reads them anew."""
        rows = replace(self.rows, reader=self._new_reader())
        stream = self._opened.rows(self._own, rows.columns.names)
        yield from rows_of(stream, rows, self._own, drops=self._resolved["unusable"] == "drop")
        rows.reader.log_counts()
