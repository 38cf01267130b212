"""Which samples of which splits are the same, or nearly: by the words of a question and by the images that it shows.

Both ways to be the same become a number for each sample, equal where they are: of all splits together, so that what is
looked for within one and between two is the same thing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vltrain.data.report.looks import Looks, look_at, near_images
from vltrain.data.report.same import same_images
from vltrain.data.report.samples import Split
from vltrain.data.report.texts import near_texts

MOST_IMAGES = 10_000
"""Distinct images of a split that are decoded; of more, so many are drawn."""


@dataclass(frozen=True, kw_only=True)
class Alike:
    """What of the splits is alike.

    files      distinct image files of all splits, by the split that shows them first, then in the order of its samples
    shown_by   for each split, which of `files` it shows
    bytes_of   by file, the number of the first one with the same bytes
    looks_of   by file, the number of the first one that looks the same, or has the same bytes
    decoded    the files that `looks` is of
    """

    files: list[Path]
    shown_by: dict[str, list[int]]
    bytes_of: list[int]
    looks_of: list[int]
    decoded: list[int]
    looks: Looks
    numbers: dict[Path, int]
    texts: dict[int, int]

    def exact_keys(self, split: Split) -> list[Hashable]:
        """Of each sample, its question and its images by their bytes."""
        return self._keys(split, self.bytes_of, {})

    def near_keys(self, split: Split) -> list[Hashable]:
        """The same, where what is nearly equal counts as equal."""
        return self._keys(split, self.looks_of, self.texts)

    def _keys(self, split: Split, classes: Sequence[int], texts: dict[int, int]) -> list[Hashable]:
        return [
            (texts.get(asked, asked), tuple(classes[self.numbers[file]] for file in files))
            for asked, files in zip(split.asked, split.images, strict=True)
        ]


def compare(splits: Sequence[Split], max_pixels: int, most_images: int = MOST_IMAGES) -> Alike:
    """Compares the samples of some splits, of which no two have one name."""
    numbers: dict[Path, int] = {}
    shown_by: dict[str, list[int]] = {}
    for split in splits:
        shown = dict.fromkeys(file for files in split.images for file in files)
        shown_by[split.name] = [numbers.setdefault(file, len(numbers)) for file in shown]
    files = list(numbers)
    bytes_of = same_images(files)
    decoded = sorted({one for shown in shown_by.values() for one in _drawn(shown, bytes_of, most_images)})
    looks = look_at([files[one] for one in decoded], max_pixels)
    looks_of = list(bytes_of)
    for place, first in enumerate(near_images(looks)):
        looks_of[decoded[place]] = decoded[first]
    looks_of = [looks_of[first] for first in bytes_of]
    sketches = {digest: sketch for split in splits for digest, sketch in split.sketches.items()}
    return Alike(
        files=files, shown_by=shown_by, bytes_of=bytes_of, looks_of=looks_of, decoded=decoded, looks=looks,
        numbers=numbers, texts=near_texts(sketches),
    )  # fmt: skip


def _drawn(shown: Sequence[int], bytes_of: Sequence[int], most: int) -> list[int]:
    """Of the images that a split shows, one of each that are the same, and at most so many."""
    distinct = np.array(sorted({bytes_of[one] for one in shown}), np.int64)
    if len(distinct) > most:
        distinct = np.random.default_rng(0).choice(distinct, most, replace=False)
    return distinct.tolist()
