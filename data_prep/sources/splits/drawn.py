"""Splits drawn by image, for a data set that has none of its own."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from data_prep.sources.raw import ImageSource, RawSample, kept
from vltrain.config.ranges import Range
from vltrain.data.report.groups import Groups
from vltrain.data.report.same import same_images
from vltrain.errors import InputError

logger = logging.getLogger(__name__)

FRACTIONS: dict[str, Range] = dict.fromkeys(
    ("val_fraction", "test_fraction"), Range(0, 1, open_high=True, hint="; 0: no such split")
)
"""The ranges of the options of a source that draws its own splits."""


def check_fractions(source: str, resolved: Mapping[str, Any]) -> None:
    """Raises InputError if the options `val_fraction` and `test_fraction` of a source leave nothing to train on."""
    fractions = [resolved.get(name, 0.0) for name in FRACTIONS]
    if sum(fractions) >= 1:
        found = f"found {fractions[0]} and {fractions[1]}"
        raise InputError(
            f"source '{source}', options 'val_fraction' and 'test_fraction': {found}, expected together less "
            "than 1, some left to train on"
        )


def drawn(
    source: str, read: Callable[[], Iterable[RawSample]], resolved: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[RawSample]:
    """Samples with `val` and `test` drawn by image, the rest in `train`.

    Args:
        read: gives all samples, the same ones each time; called twice, so that none is kept in memory. Their own splits
            are not looked at.
        resolved: the source's options, with `val_fraction` and perhaps `test_fraction`.
        given: those that the user named.

    Raises:
        InputError: fractions that nothing can be drawn by; no sample left to train on; a fraction that the user named
            and that no group fell into (by the default fraction, that is told).
    """
    check_fractions(source, resolved)
    fractions = {split: resolved.get(f"{split}_fraction", 0.0) for split in ("val", "test")}
    if not any(fractions.values()):
        yield from (replace(raw, split="train") for raw in read())
        return
    drawing = _Drawing(fractions)
    for raw in read():
        drawing.add(raw)
    drawing.draw()
    _require_filled(source, drawing.counts, drawing.num_groups, fractions, given)
    for number, raw in enumerate(read()):
        yield replace(raw, split=drawing.split_of(number, raw))


def share_of(name: str) -> float:
    """A number in [0, 1) that a name alone decides."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") / 2**32


class _Drawing:
    """The split of each sample, from what is known of each distinct image: of a sample without images, which is a group
    of its own, its id alone decides.

    counts      samples by split, once `draw` was called
    num_groups  likewise
    """

    def __init__(self, fractions: Mapping[str, float]) -> None:
        self._fractions = fractions
        self._images: dict[ImageSource, int] = {}
        self._groups = Groups()
        self._sizes: Counter[int] = Counter()  # samples, and the smallest of their ids, by their first image
        self._smallest: dict[int, str] = {}
        self._num_samples = 0
        self._lowest: list[tuple[float, int]] = []  # (share, group) of the first samples without images to leave train
        self._by_group: dict[int, str] = {}  # but those of samples without images whose share decides
        self.num_groups = 0
        self.counts: Counter[str] = Counter()

    def add(self, raw: RawSample) -> None:
        """Takes a sample."""
        number, name, images = self._num_samples, raw.sample.id, self._images
        self._num_samples += 1
        refs = [images.setdefault(kept(image), len(images)) for image in raw.image_sources]
        if not refs:
            self._add_alone(number, share_of(name))
            return
        self._groups.grow(len(images))
        for ref in refs[1:]:
            self._groups.join(ref, refs[0])
        self._sizes[refs[0]] += 1
        self._smallest[refs[0]] = min(name, self._smallest.get(refs[0], name))

    def _add_alone(self, number: int, share: float) -> None:
        self.num_groups += 1
        split = _split_at(share, self._fractions)
        self.counts[split] += 1
        lowest = self._lowest
        if split == "train" and (len(lowest) <= len(FRACTIONS) or share <= lowest[-1][0]):
            lowest.append((share, -1 - number))
            lowest.sort()
            del lowest[len(FRACTIONS) + 1 :]

    def draw(self) -> None:
        """Decides, once all samples are there."""
        for ref, first in enumerate(same_images(list(self._images))):
            self._groups.join(ref, first)
        sizes, smallest = Counter[int](), dict[int, str]()
        for ref, name in self._smallest.items():
            root = self._groups.root(ref)
            sizes[root] += self._sizes[ref]
            smallest[root] = min(name, smallest.get(root, name))
        self.num_groups += len(smallest)
        if self._num_samples == 1 and not smallest:  # more than half of all
            self._by_group, self._lowest, self.counts = {-1: "train"}, [], Counter(train=1)
        shares = {root: share_of(name) for root, name in smallest.items() if 2 * sizes[root] <= self._num_samples}
        for root in smallest:
            split = _split_at(shares[root], self._fractions) if root in shares else "train"
            self._by_group[root] = split
            self.counts[split] += sizes[root]
        self._fill(shares, sizes)

    def _fill(self, shares: Mapping[int, float], sizes: Mapping[int, int]) -> None:
        """Gives an empty split of a group or more the group of `train` whose share is the next one; `train` keeps
        one."""
        left = sorted(
            [(share, root) for root, share in shares.items() if self._by_group[root] == "train"] + self._lowest
        )
        for split, fraction in self._fractions.items():
            if not self.counts[split] and fraction * self.num_groups >= 1 and len(left) > 1:
                _, root = left.pop(0)
                self._by_group[root] = split
                self.counts.update({"train": -sizes.get(root, 1), split: sizes.get(root, 1)})

    def split_of(self, number: int, raw: RawSample) -> str:
        """The split of a sample, which came as that number. Raises InputError for an image that was not there then."""
        if not raw.image_sources:
            return self._by_group.get(-1 - number) or _split_at(share_of(raw.sample.id), self._fractions)
        ref = self._images.get(raw.image_sources[0])
        if ref is None:
            raise InputError(
                f"sample '{raw.sample.id}': was not there when the splits were drawn: the data changed while it was "
                "read; prepare again when it is whole"
            )
        return self._by_group[self._groups.root(ref)]


def _split_at(share: float, fractions: Mapping[str, float]) -> str:
    if share < fractions["val"]:
        return "val"
    return "test" if share < fractions["val"] + fractions["test"] else "train"


def _require_filled(
    source: str, counts: Mapping[str, int], num_groups: int, fractions: Mapping[str, float], given: Mapping[str, Any]
) -> None:
    total = sum(counts.values())
    told = f"of {total} sample(s) in {num_groups} group(s) that share no image"
    if total and not counts.get("train"):
        found = f"val_fraction {fractions['val']} and test_fraction {fractions['test']} {told} leave none to train on"
        raise InputError(f"source '{source}': {found}; lower them, or give more images")
    for split, fraction in fractions.items():
        if not fraction or counts.get(split) or not total:
            continue
        found = (
            f"source '{source}', option '{split}_fraction': {fraction} {told} gives no sample to the split '{split}'"
        )
        if f"{split}_fraction" in given:
            raise InputError(f"{found}; raise it, give more images, or say {split}_fraction=0 for no such split")
        logger.warning(
            "%s: there will be no %s.jsonl; raise it, or train without evaluation (eval.scorer: null)", found, split
        )
