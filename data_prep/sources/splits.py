"""Splits that share no image: drawn where a data set has none of its own, and looked at where it has.

Samples that show the same image, under one path or as equal bytes under several, belong to one group, and so do those
of groups that a sample with several images joins (connected components). A group goes to one split as a whole, drawn by
a hash of its smallest id: a group keeps its split when others come or go. A group of more than half of all samples is
trained on, since nothing could be learned without it. Where chance leaves a split empty whose fraction is of a group or
more, as among forty photos it may, the split gets the group that came closest.

Official splits stay as they are; how many images and questions they share is told.

Trade-off: images that look the same but differ in their bytes (another size, another encoder) count as different ones.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.sources.raw import ImageSource, RawSample
from vltrain.config.ranges import Range
from vltrain.errors import InputError
from vltrain.files.digest import file_digests
from vltrain.files.strict_json import read_lines
from vltrain.schema import Sample

logger = logging.getLogger(__name__)

FRACTIONS: dict[str, Range] = dict.fromkeys(
    ("val_fraction", "test_fraction"), Range(0, 1, open_high=True, hint="; 0: no such split")
)
"""The ranges of the options of a source that draws its own splits."""
_TAIL_BYTES = 4096  # of files of one size, what is compared first: headers may be alike, the last pixels hardly are


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
    splits, num_groups = _draw(read(), fractions)
    _require_filled(source, Counter(splits), num_groups, fractions, given)
    for raw, split in zip(read(), splits, strict=True):
        yield replace(raw, split=split)


def share_of(name: str) -> float:
    """A number in [0, 1) that a name alone decides."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") / 2**32


def _draw(samples: Iterable[RawSample], fractions: Mapping[str, float]) -> tuple[list[str], int]:
    """The split of each sample, and the number of groups."""
    ids: list[str] = []
    images: dict[ImageSource, int] = {}
    shown: list[tuple[int, ...]] = []
    for raw in samples:
        ids.append(raw.sample.id)
        shown.append(tuple(images.setdefault(image, len(images)) for image in raw.image_sources))
    first_alike = same_images(list(images))
    groups = _Groups(len(images))
    for refs in shown:
        for ref in refs:
            groups.join(first_alike[ref], first_alike[refs[0]])
    # A sample without images is a group of its own.
    roots = [groups.root(first_alike[refs[0]]) if refs else -1 - number for number, refs in enumerate(shown)]
    sizes, smallest = Counter(roots), dict[int, str]()
    for root, name in zip(roots, ids, strict=True):
        smallest[root] = min(name, smallest.get(root, name))
    by_root = {
        root: "train" if 2 * sizes[root] > len(ids) else _split_at(share_of(name), fractions)
        for root, name in smallest.items()
    }
    _fill(by_root, {root: share_of(name) for root, name in smallest.items() if 2 * sizes[root] <= len(ids)}, fractions)
    return [by_root[root] for root in roots], len(by_root)


def _fill(by_root: dict[int, str], shares: Mapping[int, float], fractions: Mapping[str, float]) -> None:
    """Gives an empty split of a group or more the group of `train` whose share is the next one, in place; `train` keeps
    one."""
    for split, fraction in fractions.items():
        left = sorted((share, root) for root, share in shares.items() if by_root[root] == "train")
        if split not in by_root.values() and fraction * len(by_root) >= 1 and len(left) > 1:
            by_root[left[0][1]] = split


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


class _Groups:
    """Disjoint sets of numbers (union-find with path halving)."""

    def __init__(self, size: int) -> None:
        self._parents = array("q", range(size))

    def root(self, one: int) -> int:
        parents = self._parents
        while parents[one] != one:
            parents[one] = parents[parents[one]]
            one = parents[one]
        return one

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        self._parents[max(one, other)] = min(one, other)


def same_images(sources: Sequence[ImageSource]) -> list[int]:
    """For each image the number of the first one that is the same: an equal file, by its bytes, or drawn by an equal
    drawer.

    A file that cannot be read is like no other; whoever needs it says so.
    """
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        key = _size_of(source) if isinstance(source, Path) else source
        if key is not None:
            alike[key].append(number)
    for look in (_tail_of, file_digests):
        finer: dict[Hashable, list[int]] = defaultdict(list)
        for key, numbers in alike.items():
            if len(numbers) == 1:
                continue
            files = [path for number in numbers if isinstance(path := sources[number], Path)]
            looks: Sequence[Hashable] = look(files) if files else numbers[:1] * len(numbers)
            for number, seen in zip(numbers, looks, strict=True):
                finer[key, seen].append(number)
        alike = finer
    first = list(range(len(sources)))
    for numbers in alike.values():
        for number in numbers:
            first[number] = numbers[0]
    return first


def _size_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def _tail_of(paths: Sequence[Path]) -> list[bytes | Path]:
    tails: list[bytes | Path] = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
                tails.append(stream.read())
        except OSError:
            tails.append(path)
    return tails


def overlap_of(files: Mapping[str, Path]) -> list[str]:
    """`SplitOverlap.lines` of samples that are prepared already, by split their file. Raises InputError for a malformed
    sample."""
    overlap, images = SplitOverlap(), dict[str, ImageSource]()
    for split, path in files.items():
        for where, record in read_lines(path, "prepared samples"):
            sample = Sample.from_json(record, where)
            names = [str(path.parent / name) for name in sample.images]
            overlap.add(split, sample, names)
            images.update((name, Path(name)) for name in names)
    return overlap.lines(images)


class SplitOverlap:
    """What the splits of a data set have in common: images, and questions about the same images. Some tens of bytes a
    sample."""

    def __init__(self) -> None:
        self._splits: dict[str, int] = {}
        self._images: dict[str, int] = {}
        self._samples: list[tuple[int, tuple[int, ...], bytes]] = []

    def add(self, split: str, sample: Sample, names: Sequence[str]) -> None:
        """Takes a sample; `names`: of its images, each of which stands for one file."""
        refs = tuple(self._images.setdefault(name, len(self._images)) for name in names)
        asked = "\0".join(turn.text for turn in sample.turns[:-1])
        digest = hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._samples.append((self._splits.setdefault(split, len(self._splits)), refs, digest))

    def lines(self, sources: Mapping[str, ImageSource]) -> list[str]:
        """A line for each pair of splits that share an image or a question. `sources`: where each name's image comes
        from."""
        if len(self._splits) < 2:
            return []
        first_alike = same_images([sources[name] for name in self._images])
        shown: list[set[int]] = [set() for _ in self._splits]
        asked: list[set[tuple[tuple[int, ...], bytes]]] = [set() for _ in self._splits]
        for split, refs, digest in self._samples:
            same = tuple(first_alike[ref] for ref in refs)
            shown[split].update(same)
            asked[split].add((same, digest))
        order = sorted(self._splits, key=lambda name: (name != "train", name != "val", name))
        pairs = [(one, other) for place, one in enumerate(order) for other in order[place + 1 :]]
        return [line for one, other in pairs if (line := self._compared(one, other, shown, asked, first_alike))]

    def _compared(
        self,
        one: str,
        other: str,
        shown: list[set[int]],
        asked: list[set[tuple[tuple[int, ...], bytes]]],
        first_alike: list[int],
    ) -> str | None:
        here, there = self._splits[one], self._splits[other]
        images, questions = shown[here] & shown[there], asked[here] & asked[there]
        if not images and not questions:
            return None
        affected = repeated = total = 0
        for split, refs, digest in self._samples:
            if split == there:
                same = tuple(first_alike[ref] for ref in refs)
                total += 1
                affected += not images.isdisjoint(same)
                repeated += (same, digest) in questions
        told = (
            f"{repeated} of the {total} sample(s) of '{other}' ask what a sample of '{one}' asks about the same "
            "image(s), or about none"
        )
        if images:
            told = (
                f"{len(images)} of the {len(shown[there])} image(s) of '{other}' are in '{one}' too, by their "
                f"bytes; {affected} sample(s) show them, and {told}"
            )
        return f"splits '{one}' and '{other}' overlap, and were left so: {told}"
