"""Raw data set -> samples:
`python -m data_prep.prepare --source NAME --input PLACE --output DIR [--options key=value ...]`.

Writes `DIR/SPLIT.jsonl`, a sample per line, and `DIR/images/`, to which the samples refer relative to the file. Every
image is opened and decoded once here, so that a damaged one is found now and not in the middle of a training run.
Images are copies, so that one that is edited later does not change what was prepared. DIR appears whole or not at all.

In parts (`data_prep.parts`) each part decodes its share of the images, which is what takes time, and the merge writes
the samples.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_prep.command_line import CommandLine, add_quiet_option, whole
from data_prep.copied_images import Images, Named, copy_or_draw, link_or_copy, warn_of_dark_images
from data_prep.parallel import in_chunks, ordered_map, usable_cores
from data_prep.parts import (
    Share,
    add_share_options,
    finished_parts,
    is_done,
    new_part,
    read_share,
    remove_parts,
    require_same_raw,
)
from data_prep.reading import ELSEWHERE, Reading
from data_prep.sources import SOURCES, option_texts, places_of
from data_prep.sources.splits import SplitOverlap
from vltrain.config.ranges import MOST_PIXELS, MOST_WORKERS
from vltrain.config.schema import OWN, DataConfig
from vltrain.console import Progress, start_logging, watched
from vltrain.data.flat.unique_ids import UniqueIds
from vltrain.data.folder import new_folder
from vltrain.data.origin import SAMPLES, SAMPLES_RECORD, Prepared, refresh_stats, write_prepared
from vltrain.errors import InputError, exits_cleanly, nearest
from vltrain.files.record import FILE, FileRecord, Seen, look, read_record, stat_of
from vltrain.schema import Sample

IMAGES = "images"
MAX_IMAGE_PIXELS = DataConfig().max_image_pixels
CHECKED = "images.arrow"  # in a part: the record of the images that it has checked, raw and copied
_CHUNK = 64

EXAMPLES = (
    "--source easyvqa --output data/easyvqa/samples",
    "--source scienceqa --input data/ScienceQA --output data/sqa/samples --options prompt_format=QCM-ALE",
    "--source llava_json --input mine.json --output data/mine/samples --options images=photos val_fraction=0.1",
)

logger = logging.getLogger(__name__)

_as_json = json.JSONEncoder(ensure_ascii=False).encode
_text: Callable[[str], str] = encode_basestring  # pyright: ignore[reportUnknownVariableType]


def prepare(
    source: str,
    input: Path | None,
    output: Path,
    options: Mapping[str, Any] | None = None,
    *,
    workers: int | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    share: Share | None = None,
    rebuild: bool = False,
) -> dict[str, int]:
    """Prepares a raw data set.

    Args:
        source: a name of `data_prep.sources.SOURCES`.
        input: where the raw data is; None where the source finds it by itself.
        output: new folder.
        options: of the source.
        workers: processes that check images; None: all usable cores.
        max_image_pixels: larger images are refused.
        share: do only a part of the work, or merge the parts; None: everything at once.
        rebuild: what is there already is replaced once the new samples are whole.

    Returns:
        Samples per split.

    Raises:
        InputError: unknown source or option, malformed or empty data, an id or image name that comes twice, an image
            that is missing or damaged, an output that exists or cannot be written, parts that are missing or were made
            of something else.
    """
    if source not in SOURCES:
        already = (
            "samples are prepared: name them in a recipe, data.source: samples"
            if source == OWN
            else nearest(source, SOURCES)
        )
        raise InputError(f"unknown source '{source}'; {already}")
    options = options or {}
    wanted = _Wanted(source, input, options, option_texts(source, options), max_image_pixels)
    reading = Reading(places_of(source, input, options))
    workers = usable_cores() if workers is None else workers
    checks = _Checks(workers, max_image_pixels, _image_roots(input, options), reading)
    if share is not None and share.part is not None:
        return _prepare_part(wanted, output, checks, share, share.part)
    return _prepare_whole(wanted, output, checks, share, rebuild=rebuild)


@dataclass(frozen=True)
class _Wanted:
    """What is prepared; `settled`: the options with their defaults."""

    source: str
    input: Path | None
    options: Mapping[str, Any]
    settled: dict[str, str]
    max_image_pixels: int

    def made_with(self) -> dict[str, Any]:
        """What parts of one whole have in common."""
        return {"source": self.source, "options": self.settled, "max_image_pixels": self.max_image_pixels}


def _prepare_part(wanted: _Wanted, output: Path, checks: _Checks, share: Share, part: int) -> dict[str, int]:
    """Copies or draws the images of one part, unless that is done."""
    counts: Counter[str] = Counter()
    reading = checks.reading
    images: Images = {}
    for _ in _write_samples(wanted, images, counts, reading, _Files(None, _existing(output))):
        pass
    made_with = {**wanted.made_with(), "raw": reading.record(_paths_in(images)).digest(*_everywhere(reading))}
    if not is_done(output, share, made_with):
        names = _names_of_part(images, share, part)
        with new_part(output, share, made_with) as folder:
            checks.run([(name, images[name]) for name in names], folder).write(folder / CHECKED)
    return dict(counts)


def _prepare_whole(
    wanted: _Wanted, output: Path, checks: _Checks, share: Share | None, *, rebuild: bool
) -> dict[str, int]:
    """Writes the samples, and images that are copied or drawn here, or with `share` taken from its parts."""
    counts: Counter[str] = Counter()
    reading, made_with = checks.reading, wanted.made_with()
    parts = finished_parts(output, share, made_with) if share is not None else []
    with new_folder(output, replace=rebuild) as folder:
        images: Images = {}
        overlap = SplitOverlap(folder)
        met = _write_samples(wanted, images, counts, reading, _Files(overlap, folder))
        record = checks.run(met, folder) if share is None else _take_images(met, reading, share, parts, folder)
        rows = zip(record.places, record.names, record.digests, strict=True)
        digests = {name: digest for place, name, digest in rows if place == SAMPLES}
        for line in overlap.lines({name: source for name, (source, _) in images.items()}, digests):
            logger.warning("source '%s': %s", wanted.source, line)
        record.extend(reading.record(_paths_in(images)))
        record.add_all(SAMPLES, ((f"{split}.jsonl", look(folder / f"{split}.jsonl")) for split in counts))
        places, options = (
            {name: str(value) for name, value in one.items()} for one in (reading.places, wanted.options)
        )
        prepared = Prepared(
            source=wanted.source, places=places, options=options, settled=wanted.settled,
            max_image_pixels=wanted.max_image_pixels,
        )  # fmt: skip
        write_prepared(folder, prepared, record)
    if share is not None:
        remove_parts(output)
        # a file that loses one of its names has changed
        refresh_stats(output / SAMPLES_RECORD, record, {SAMPLES: output})
    return dict(counts)


def _everywhere(reading: Reading) -> tuple[str, ...]:
    return (*reading.places, ELSEWHERE)


def _paths_in(images: Images) -> Iterator[Path]:
    return (source for source, _ in images.values() if isinstance(source, Path))


def _names_of_part(images: Images, share: Share, part: int) -> list[str]:
    first, last = share.bounds(part, len(images))
    return list(images)[first:last]


def _image_roots(input: Path | None, options: Mapping[str, Any] | None) -> tuple[Path, ...]:
    """Folders out of which no link of an image may lead: the raw data's, and that of images where an option names one.
    None for data of a package."""
    named = [Path(str(options["images"]))] if options and options.get("images") else []
    return (input if input.is_dir() else input.parent, *named) if input is not None else ()


@dataclass(frozen=True)
class _Checks:
    """`copy_or_draw` in several processes. `roots`: out of which no link of an image may lead."""

    workers: int
    max_image_pixels: int
    roots: tuple[Path, ...]
    reading: Reading

    def run(self, images: Iterable[Named], folder: Path) -> FileRecord:
        """Fills `folder` while the images are still being named; tells how many come out dark. Returns the images'
        record."""
        checked = ordered_map(
            copy_or_draw, in_chunks(images, _CHUNK), self.workers, (folder, self.max_image_pixels, self.roots)
        )
        dark: list[str] = []
        record = FileRecord()
        with Progress(total=None, title="images", unit="image") as progress:
            for done, found in checked:
                progress.update(len(done))
                dark += found
                for name, source, digest, raw, copied in done:
                    record.add(SAMPLES, name, Seen(FILE, digest, copied))
                    if source is not None and raw is not None:
                        record.add(*self.reading.name_of(source), Seen(FILE, digest, raw))
        warn_of_dark_images(dark)
        return record


def _take_images(met: Iterable[Named], reading: Reading, share: Share, parts: list[Path], folder: Path) -> FileRecord:
    """Takes what the parts have copied or drawn. Raises InputError if a part was made of other raw data than is there
    now, or was changed since."""
    images = dict(met)
    require_same_raw(parts, reading.record(_paths_in(images)).digest(*_everywhere(reading)))
    whole = FileRecord()
    for part, made in enumerate(parts, start=1):
        record = read_record(made / CHECKED)
        if [
            name for place, name in zip(record.places, record.names, strict=True) if place == SAMPLES
        ] != _names_of_part(images, share, part):
            raise InputError(f"{made}: was made of other raw data than is there now; remove it and run the part again")
        if changed := record.changes({SAMPLES: made}):
            raise InputError(f"{made}: {'; '.join(changed)} since the part was made; remove it and run the part again")
        for place, name, seen in record.rows():
            if place == SAMPLES:
                link_or_copy(made / name, folder / name)
                seen = seen._replace(stat=stat_of(folder / name))
            whole.add(place, name, seen)
    return whole


@dataclass(frozen=True)
class _Files:
    """Where samples are written; without `overlap` nowhere. `folder`: on whose disk ids wait, too."""

    overlap: SplitOverlap | None
    folder: Path


def _write_samples(
    wanted: _Wanted, images: Images, counts: Counter[str], reading: Reading, files: _Files
) -> Iterator[Named]:
    """Checks a source's samples, and writes the JSONL files if it is told where; counts them by split, fills `images`
    and yields each when it first comes."""
    unique, overlap = UniqueIds(files.folder, "unique over all splits"), files.overlap
    with ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for raw in watched(
            reading.watch(SOURCES[wanted.source](wanted.input, wanted.options)), title="samples", unit="sample"
        ):
            sample, split = raw.sample, raw.split
            unique.add(sample.id)
            names = [_image_name(name) for name in sample.images]
            for name, image_source in zip(names, raw.image_sources, strict=True):
                known = images.get(name)
                if known is None:
                    images[name] = image_source, sample.id
                    yield name, images[name]
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
    unique.finish(lambda: (raw.sample.id for raw in SOURCES[wanted.source](wanted.input, wanted.options)))


def _existing(place: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next((one for one in (place, *place.absolute().parents) if one.is_dir()), place)


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
def _image_name(name: str) -> str:
    """Where a sample's image, whose path was checked, lies below the samples' folder."""
    return str(IMAGES / PurePosixPath(name))


def parse_options(pairs: list[str]) -> dict[str, str]:
    """`key=value` texts to a dictionary."""
    options: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InputError(f"--options: found '{pair}', expected key=value")
        options[key] = value
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine("prepare", "Turn a raw data set into samples.", arguments, EXAMPLES)
    parser.add_argument("--source", required=True, help=f"one of {', '.join(sorted(SOURCES))}")
    parser.add_argument("--input", type=Path, help="the raw data; not needed by easyvqa and shapes")
    parser.add_argument("--output", type=Path, required=True, help="new folder for SPLIT.jsonl and images/")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="options of the source")
    parser.add_argument(
        "--workers", type=whole(1, MOST_WORKERS), help="processes that check images (default: all cores)"
    )
    parser.add_argument(
        "--max-image-pixels", type=whole(1, MOST_PIXELS), default=MAX_IMAGE_PIXELS, help="larger images are refused"
    )
    add_share_options(parser)
    add_quiet_option(parser)
    parser.add_argument(
        "--rebuild", action="store_true", help="replace existing samples, once the new ones are complete"
    )
    given = parser.read()
    start_logging(quiet=given.quiet)
    share = read_share(given)
    if share is not None and given.rebuild:
        raise InputError("--rebuild cannot be combined with --parts; remove the output, or name another one")
    counts = prepare(
        given.source, given.input, given.output, parse_options(given.options), workers=given.workers,
        max_image_pixels=given.max_image_pixels, share=share, rebuild=given.rebuild,
    )  # fmt: skip
    if share is not None and share.part is not None:
        print(f"part {share.part} of {share.parts} is done")
        return
    if given.quiet:
        print(f"{given.output}: {', '.join(f'{count} samples of {split}' for split, count in counts.items())}")
        return
    for split, count in counts.items():
        print(f"{given.output / split}.jsonl: {count} samples")


if __name__ == "__main__":
    raise SystemExit(main())
