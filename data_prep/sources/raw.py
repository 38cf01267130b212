"""What a reader of a raw data set yields, and fields that several have. JSON is read by `vltrain.files.strict_json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.strict_json import field, id_text
from vltrain.schema import Sample, path_fault

ImageSource = Path | Callable[[], bytes]
"""An image file, or what draws one: called in a worker process for the file's bytes, so it can be pickled and
compared."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """A sample, its split, and where its images come from.

    `image_sources` has one for each of `sample.images`; those are the names the images get in the prepared folder,
    below `images/`.
    """

    split: str
    sample: Sample
    image_sources: tuple[ImageSource, ...] = ()


def ids_of(splits: Mapping[str, Any], split: str, where: str) -> list[str]:
    """The ids that a file of splits lists for one, none where it does not name it. InputError if that is no list of
    ids."""
    listed: list[Any] = field(splits, split, list, where) if split in splits else []
    return [id_text(one, f"{where}: {split}[{number}]") for number, one in enumerate(listed)]


def image_name(record: Any, key: str, where: str) -> str:
    """`record[key]`, an image's path below its folder. Raises InputError as `field`, and for one that leads out of the
    folder."""
    name = field(record, key, str, where)
    fault = path_fault(name)
    if fault is not None:
        raise InputError(f"{where}: {key}: found {name!r}, which {fault}")
    return name
