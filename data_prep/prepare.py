"""Raw data set -> samples:
`python -m data_prep.prepare --source NAME --input PLACE --output DIR [--options key=value ...]`.

Writes `DIR/SPLIT.jsonl`, a sample per line, and `DIR/images/`, to which the samples refer relative to the file. Every
image is opened and decoded once here, so that a damaged one is found now and not in the middle of a training run.
Images are copies, so that one that is edited later does not change what was prepared. DIR appears whole or not at all.

In parts (`data_prep.parts`) each part decodes its share of the images, which is what takes time, and the merge writes
the samples. Samples that bring their images' bytes are read once more for that.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_prep.command_line import CommandLine, add_quiet_option, folder_here, whole
from data_prep.copied_images import Images, Named, copy_or_draw, link_or_copy, warn_of_dark_images
from data_prep.parallel import in_chunks, ordered_map, usable_cores
from data_prep.parts import (
    Share,
    add_share_options,
    finished_parts,
    missing_parts,
    new_part,
    read_share,
    remove_parts,
    require_same_raw,
    was_merged,
)
from data_prep.reading import ELSEWHERE, Reading
from data_prep.sources import SOURCES, option_texts, places_of
from data_prep.sources.splits import SplitOverlap
from data_prep.steps.written import Files, Wanted, existing_above, sources_of, write_samples
from vltrain.config.ranges import MOST_PIXELS, MOST_WORKERS
from vltrain.config.schema import OWN, DataConfig
from vltrain.console import Progress, start_logging
from vltrain.data.folder import new_folder
from vltrain.data.origin import (
    SAMPLES,
    SAMPLES_RECORD,
    Prepared,
    changes_since,
    read_prepared,
    refresh_stats,
    write_prepared,
)
from vltrain.errors import InputError, exits_cleanly, nearest
from vltrain.files.record import FILE, FileRecord, Seen, look, read_record, stat_of

MAX_IMAGE_PIXELS = DataConfig().max_image_pixels
CHECKED = "images.arrow"  # in a part: the record of the images that it has checked, raw and copied
_CHUNK = 64

EXAMPLES = (
    "--source easyvqa --output data/easyvqa/samples",
    "--source scienceqa --input data/ScienceQA --output data/sqa/samples --options prompt_format=QCM-ALE",
    "--source llava_json --input mine.json --output data/mine/samples --options images=photos val_fraction=0.1",
)

logger = logging.getLogger(__name__)


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
        share: do only a part of the work, merge the parts, or do both in turn; None: everything at once.
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
    wanted = Wanted(source, input, options, option_texts(source, options), max_image_pixels)
    reading = Reading(places_of(source, input, options))
    workers = usable_cores() if workers is None else workers
    checks = _Checks(workers, max_image_pixels, _image_roots(input, options), reading)
    if share is None:
        return _prepare_whole(wanted, output, checks, None, rebuild=rebuild)
    if share.in_turn and was_merged(output):
        return _finish_merge(wanted, output, checks)
    if share.part is not None or share.in_turn:
        counts = _prepare_parts(wanted, output, checks, share)
        if share.part is not None:
            return counts
    return _prepare_whole(wanted, output, checks, share, rebuild=False)


def _prepare_parts(wanted: Wanted, output: Path, checks: _Checks, share: Share) -> dict[str, int]:
    """Copies or draws the images of one part, or of all in turn, unless that is done."""
    counts: Counter[str] = Counter()
    reading = checks.reading
    images: Images = {}
    with _one_reader_talks(share):
        for _ in write_samples(wanted, images, counts, reading, Files(None, existing_above(output))):
            pass
    made_with = {**wanted.made_with(), "raw": reading.record(_paths_in(images)).digest(*_everywhere(reading))}
    parts = missing_parts(output, share, made_with)
    names = {part: _names_of_part(images, share, part) for part in parts}
    sources = sources_of(wanted, images, list(chain.from_iterable(names.values())), reading)
    for part in parts:
        with new_part(output, replace(share, part=part), made_with) as folder, _one_reader_talks(share):
            checks.run(islice(sources, len(names[part])), folder).write(folder / CHECKED)
    return dict(counts)


def _one_reader_talks(share: Share) -> AbstractContextManager[Any]:
    """What a reader prints of its data, where it reads them three times in one command: the merge's is the last."""
    return redirect_stdout(io.StringIO()) if share.in_turn else nullcontext()


def _finish_merge(wanted: Wanted, output: Path, checks: _Checks) -> dict[str, int]:
    """Removes the parts of a whole that is there. Raises InputError where it was made of something else."""
    made = read_prepared(output)
    if made is None or (made.source, made.settled, made.max_image_pixels) != (
        wanted.source, wanted.settled, wanted.max_image_pixels
    ):  # fmt: skip
        raise InputError(f"{output}: exists already, made of something else; remove it or name another output")
    if changed := changes_since(output, made, {SAMPLES: output, ELSEWHERE: Path("/"), **checks.reading.places}):
        raise InputError(f"{output}: exists already, and {'; '.join(changed)}; remove it or name another output")
    remove_parts(output)
    refresh_stats(output / SAMPLES_RECORD, read_record(output / SAMPLES_RECORD, made.files), {SAMPLES: output})
    return {file.stem: sum(1 for _ in file.open("rb")) for file in sorted(output.glob("*.jsonl"))}


def _prepare_whole(
    wanted: Wanted, output: Path, checks: _Checks, share: Share | None, *, rebuild: bool
) -> dict[str, int]:
    """Writes the samples, and images that are copied or drawn here, or with `share` taken from its parts."""
    counts: Counter[str] = Counter()
    reading, made_with = checks.reading, wanted.made_with()
    parts = finished_parts(output, share, made_with) if share is not None else []
    with new_folder(output, replace=rebuild) as folder:
        images: Images = {}
        overlap = SplitOverlap(folder)
        met = write_samples(wanted, images, counts, reading, Files(overlap, folder))
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
            max_image_pixels=wanted.max_image_pixels, provenance=reading.facts,
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
    parser.add_argument("--output", type=folder_here, required=True, help="new folder for SPLIT.jsonl and images/")
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
