"""What a reader of a raw data set yields, and fields that several have. JSON is read by `vltrain.files.strict_json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.record import digest_of
from vltrain.files.strict_json import field as field_of
from vltrain.files.strict_json import id_text
from vltrain.schema import Sample, path_fault

ImageSource = Path | Callable[[], bytes]
"""An image file, or what draws or fetches one: called in a worker process for the file's bytes, so it can be pickled
and compared."""


@dataclass(frozen=True)
class Embedded:
    """An image whose bytes came with its sample. It is its digest's, so that whoever compares or remembers it can do
    without the bytes: `kept`."""

    digest: bytes
    data: bytes | None = field(compare=False, repr=False)

    @classmethod
    def of(cls, data: bytes) -> Embedded:
        return cls(digest_of(data), data)

    def __call__(self) -> bytes:
        assert self.data is not None, "one that is only remembered"
        return self.data


def kept(source: ImageSource) -> ImageSource:
    """What is remembered of an image while others are read."""
    return Embedded(source.digest, None) if isinstance(source, Embedded) else source


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
    listed: list[Any] = field_of(splits, split, list, where) if split in splits else []
    return [id_text(one, f"{where}: {split}[{number}]") for number, one in enumerate(listed)]


def image_name(record: Any, key: str, where: str) -> str:
    """`record[key]`, an image's path below its folder. Raises InputError as `field`, and for one that leads out of the
    folder."""
    name = field_of(record, key, str, where)
    fault = path_fault(name)
    if fault is not None:
        raise InputError(f"{where}: {key}: found {name!r}, which {fault}")
    return name
