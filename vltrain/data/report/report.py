"""The report on the data of a recipe, as `vltrain check recipe` shows it: a line for each thing looked at.

What stands in it was found by reading the packs and the samples of the recipe's splits; nothing is made or changed.
Large sets are drawn from, and the lines say how many were looked at. Of easy-VQA's 48,248 questions about 5,000 images
it takes some four seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from vltrain.config.schema import Config
from vltrain.data.origin import read_made_from
from vltrain.data.report import answers, overlap, packed
from vltrain.data.report.alike import Alike, compare
from vltrain.data.report.as_packed import as_packed
from vltrain.data.report.finding import FAILED, OK, WARNING, Finding, some, spread
from vltrain.data.report.samples import Split, read_split
from vltrain.data.sample_files import samples_file, samples_folder
from vltrain.data.shards import PackedDataset
from vltrain.data.text.encoder import SampleEncoder
from vltrain.errors import InputError
from vltrain.files.record import look

Judge = Callable[[Split, int, str], bool]
"""(split, number of the sample in it, a text) -> whether the recipe's scorer calls that right."""


def data_report(config: Config, packs: PackedDataset, encoder: SampleEncoder, judge: Judge | None) -> list[Finding]:
    """Everything, of the packs that are trained on and of the samples of each split that the recipe names.

    Args:
        encoder: that the packs were made with.
        judge: None where answers are judged by degrees or all together, ranked, or not at all.

    Raises: InputError for a samples file that is malformed.
    """
    data = config.data
    packed_from, why = _train_file(config, packs)
    files = {name: file for name in (data.eval_split, data.test_split) if (file := _file_of(config, name)) is not None}
    train = None if packed_from is None else read_split(data.train_split, packed_from)
    splits = [] if train is None else [train]
    splits += [read_split(name, file) for name, file in files.items() if name != data.train_split]
    said = {} if train is None else dict(zip(train.ids, train.spoken, strict=True))
    found = _of_packs(packs, encoder, packed.parts_of(packs), said)
    if train is not None:
        found.append(as_packed(packs, train.file, encoder, data.max_image_pixels))
    else:
        status = OK if data.train_packs is None else WARNING
        found.append(Finding(status=status, what="samples", found=f"not compared with the test: {why}"))
    alike = compare(splits, data.max_image_pixels)
    found += _images(splits, alike)
    if train is not None:
        found.append(overlap.repeats(train, alike))
        found += [one for split in splits if split is not train for one in overlap.overlaps(train, split, alike)]
    found += [answers.distribution(split) for split in splits]
    return found + (_longest(config, splits, train, encoder, judge) if config.eval.method == "generate" else [])


def _of_packs(
    packs: PackedDataset, encoder: SampleEncoder, parts: list[packed.Part], said: Mapping[str, tuple[str, ...]]
) -> list[Finding]:
    return [
        packed.lengths(packs, parts),
        packed.unknown_tokens(packs, parts, encoder.tokenizer),
        packed.labels(parts, said, encoder.tokenizer, encoder.stop_ids),
    ]


def _train_file(config: Config, packs: PackedDataset) -> tuple[Path | None, str]:
    """The file of the samples that are trained on; of `data.train_packs` the one that they were packed from, where it
    is the same still. Else why there is none, in words."""
    own = _file_of(config, config.data.train_split)
    if config.data.train_packs is None:
        return own, "those of training are not where the recipe says"
    made = read_made_from(packs.folder)
    if made is None:
        return None, f"{packs.folder} (data.train_packs) has no record of the samples that it was packed from"
    beside = [file.parent / made.name for name in (config.data.eval_split, config.data.test_split)
              if (file := _file_of(config, name)) is not None]  # fmt: skip
    for file in dict.fromkeys([own, samples_folder(config) / made.name, *beside]):
        if file is not None and file.is_file() and look(file).digest.hex() == made.samples:
            return file, ""
    folders = ", ".join(dict.fromkeys(str(file.parent) for file in beside)) or str(samples_folder(config))
    return None, (
        f"{packs.folder} (data.train_packs) was packed from a file {made.name} that is not in {folders}, or has "
        "changed since; put it there, and its samples and images are compared"
    )


def _file_of(config: Config, split: str) -> Path | None:
    try:
        file = samples_file(config, split)
    except InputError:  # of own samples, a split without a file: whoever needs it says so
        return None
    return file if file.is_file() else None


def _images(splits: list[Split], alike: Alike) -> list[Finding]:
    """Numbers and sizes of images, and those that cannot be read."""
    found: list[Finding] = []
    place_of = {one: place for place, one in enumerate(alike.decoded)}
    for split in splits:
        shown = alike.shown_by[split.name]
        what = f"images of '{split.name}'"
        if not shown:
            found.append(Finding(status=OK, what=what, found=f"none in {split.size}"))
            continue
        places = sorted({place for one in shown if (place := place_of.get(alike.bytes_of[one])) is not None})
        unread = [alike.looks.unread[place] for place in places if place in alike.looks.unread]
        sizes = alike.looks.sizes[[place for place in places if place not in alike.looks.unread]]
        told = f"{len(shown):,} shown by {split.size}, {spread([len(files) for files in split.images])} of a sample"
        if len(sizes):
            edges = ", ".join(f"{name} {spread(sizes[:, axis])}" for name, axis in (("widths", 1), ("heights", 0)))
            told += f"; {len(places):,} decoded: {edges}"
        if unread:
            told += f"; {len(unread):,} cannot be read"
        status = FAILED if unread else OK
        found.append(Finding(status=status, what=what, found=told, examples=some(unread)))
    return found


def _longest(
    config: Config, splits: list[Split], train: Split | None, encoder: SampleEncoder, judge: Judge | None
) -> list[Finding]:
    most = config.eval.max_new_tokens
    return [
        answers.longest(
            split,
            encoder.tokenizer,
            most,
            None if judge is None else partial(judge, split),
            measured=split is not train,
        )
        for split in splits
    ]
