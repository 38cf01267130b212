"""What a source yields becomes the samples' files: a checked sample is a line of its split's JSONL."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_prep.copied_images import Images, Named
from data_prep.reading import Reading
from data_prep.sources import SOURCES
from data_prep.sources.raw import Embedded, RawSample, kept
from data_prep.sources.splits import SplitOverlap
from vltrain.console import watched
from vltrain.data.flat.unique_ids import UniqueIds
from vltrain.errors import InputError
from vltrain.schema import Sample

IMAGES = "images"

_as_json = json.JSONEncoder(ensure_ascii=False).encode
_text: Callable[[str], str] = encode_basestring  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True)
class Wanted:
    """What is prepared; `settled`: the options with their defaults."""

    source: str
    input: Path | None
    options: Mapping[str, Any]
    settled: dict[str, str]
    max_image_pixels: int

    def samples(self) -> Iterator[RawSample]:
        """What the source yields, read anew at each call."""
        return SOURCES[self.source](self.input, self.options)

    def made_with(self) -> dict[str, Any]:
        """What parts of one whole have in common."""
        return {"source": self.source, "options": self.settled, "max_image_pixels": self.max_image_pixels}


@dataclass(frozen=True)
class Files:
    """Where samples are written; without `overlap` nowhere. `folder`: on whose disk ids wait, too."""

    overlap: SplitOverlap | None
    folder: Path


def write_samples(
    wanted: Wanted, images: Images, counts: Counter[str], reading: Reading, files: Files
) -> Iterator[Named]:
    """Checks a source's samples, and writes the JSONL files if it is told where; counts them by split, fills `images`
    and yields each when it first comes."""
    unique, overlap = UniqueIds(files.folder, "unique over all splits"), files.overlap
    with ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for raw in watched(reading.watch(wanted.samples()), title="samples", unit="sample"):
            sample, split = raw.sample, raw.split
            unique.add(sample.id)
            names = [image_name(name) for name in sample.images]
            for name, image_source in zip(names, raw.image_sources, strict=True):
                known = images.get(name)
                if known is None:
                    images[name] = kept(image_source), sample.id
                    yield name, (image_source, sample.id)
                elif known[0] is not image_source and known[0] != image_source:  # paths compare slowly
                    raise InputError(
                        f"sample '{sample.id}': image name '{name}' stands for both {known[0]} and {image_source}"
                    )
            counts[split] += 1
            if overlap is None:
                continue
            overlap.add(split, sample, names)
            if split not in streams:
                streams[split] = stack.enter_context((files.folder / f"{split}.jsonl").open("wb"))
            streams[split].write(_line(sample, names))
    if not counts:
        named = f" from {wanted.input}" if wanted.input else ""
        raise InputError(f"source '{wanted.source}' yielded no samples{named}; is this the right input?")
    unique.finish(lambda: (raw.sample.id for raw in wanted.samples()))


def _line(sample: Sample, images: list[str]) -> bytes:
    """As `json.dumps` of `Sample.to_json` writes it."""
    turns = ", ".join([f'{{"role": {_text(turn.role)}, "text": {_text(turn.text)}}}' for turn in sample.turns])
    line = (
        f'{{"id": {_text(sample.id)}, "images": [{", ".join(map(_text, images))}], "turns": [{turns}], '
        f'"metadata": {_as_json(sample.metadata)}}}\n'
    )
    try:
        return line.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"sample '{sample.id}': its metadata is not valid text ({error})") from None


@functools.lru_cache(maxsize=1 << 16)
def image_name(name: str) -> str:
    """Where a sample's image, whose path was checked, lies below the samples' folder."""
    return str(IMAGES / PurePosixPath(name))


def existing_above(place: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next((one for one in (place, *place.absolute().parents) if one.is_dir()), place)


def sources_of(wanted: Wanted, images: Images, names: list[str], reading: Reading) -> Iterator[Named]:
    """Images by name, in the order in which they first come. Those whose bytes came with their samples are read once
    more."""
    if not any(isinstance(images[name][0], Embedded) for name in names):
        yield from ((name, images[name]) for name in names)
        return
    left = set(names)
    for raw in reading.watch(wanted.samples()):
        for name, image_source in zip(map(image_name, raw.sample.images), raw.image_sources, strict=True):
            if name in left:
                left.remove(name)
                yield name, (image_source, images[name][1])
        if not left:
            return
    raise InputError(f"source '{wanted.source}': its data changed while it was read; prepare again when it is whole")
