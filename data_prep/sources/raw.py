"""What a reader of a raw data set yields, and how it reads JSON and its fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.schema import Sample, path_fault


ImageSource = Path | Callable[[], bytes]
"""An image file, or what draws one: called in a worker process for the file's bytes, so it can be pickled and compared."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """A sample, its split, and where its images come from.

    `image_sources` has one for each of `sample.images`; those are the names the images get in the prepared folder, below `images/`.
    """

    split: str
    sample: Sample
    image_sources: tuple[ImageSource, ...] = ()


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError if it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object; InputError as `read_json`, or for anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a {type(content).__name__}, expected an object")
    return content


def ids_of(splits: dict[str, Any], split: str, where: str) -> list[str]:
    """The ids that a file of splits lists for one, none where it does not name it. InputError if that is no list of texts."""
    ids = field(splits, split, list, where) if split in splits else []
    for number, one in enumerate(ids):
        if not isinstance(one, str):
            raise InputError(f"{where}: {split}: number {number} is {one!r:.80}, expected a text")
    return ids


def image_name(record: Any, key: str, where: str) -> str:
    """`record[key]`, an image's path below its folder. Raises InputError as `field`, and for one that leads out of the folder."""
    name = field(record, key, str, where)
    fault = path_fault(name)
    if fault is not None:
        raise InputError(f"{where}: {key}: found {name!r}, which {fault}")
    return name


_NAMES = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def field(record: Any, key: str, kind: type, where: str) -> Any:
    """`record[key]`, a non-empty text where `kind` is str. Raises InputError naming `where` (file and item) and the key."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {record!r:.80}, expected an object")
    value = record.get(key)
    if type(value) is not kind or (kind is str and not value.strip()):
        found = f"{value!r:.80}" if key in record else "nothing"
        raise InputError(f"{where}: {key}: found {found}, expected {_NAMES[kind]}{' that is not empty' if kind is str else ''}")
    return value
