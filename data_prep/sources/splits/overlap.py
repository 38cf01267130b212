"""What the splits of a data set have in common, and were left with."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_prep.sources.raw import ImageSource
from vltrain.data.flat.columns import AT_ONCE, Column, in_slices
from vltrain.data.report.same import same_images
from vltrain.files.strict_json import read_lines
from vltrain.schema import Sample

_HELD = 1 << 19  # keys of samples that are in memory at a time
_BASE = np.uint64(0x9E3779B97F4A7C15)


def overlap_of(files: Mapping[str, Path]) -> list[str]:
    """`SplitOverlap.lines` of samples that are prepared already, by split their file. Raises InputError for a malformed
    sample."""
    with tempfile.TemporaryDirectory() as folder:
        overlap, images = SplitOverlap(Path(folder)), dict[str, ImageSource]()
        for split, path in files.items():
            for where, record in read_lines(path, "prepared samples"):
                sample = Sample.from_json(record, where)
                names = [str(path.parent / name) for name in sample.images]
                overlap.add(split, sample, names)
                images.update((name, Path(name)) for name in names)
        return overlap.lines(images)


class SplitOverlap:
    """What the splits of a data set have in common: images, and questions about the same images. Samples are kept on
    the disk of `folder`, the names of images in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._splits: dict[str, _Asked] = {}
        self._images: dict[str, int] = {}

    def add(self, split: str, sample: Sample, names: Sequence[str]) -> None:
        """Takes a sample; `names`: of its images, each of which stands for one file."""
        images = self._images
        asked = sample.turns[0].text if len(sample.turns) == 2 else "\0".join(turn.text for turn in sample.turns[:-1])
        if split not in self._splits:
            self._splits[split] = _Asked(self._folder)
        self._splits[split].add(asked, [images.setdefault(name, len(images)) for name in names])

    def lines(self, sources: Mapping[str, ImageSource], digests: Mapping[str, bytes] | None = None) -> list[str]:
        """A line for each pair of splits that share an image or a question. `sources`: where each name's image comes
        from. `digests`: of the images by name, where they are known: none is read then."""
        if len(self._splits) < 2:
            self.close()
            return []
        if digests is None:
            first_alike = np.array(same_images([sources[name] for name in self._images]), np.int64)
        else:  # drawers are told apart by themselves, as they are without
            known = ((digests[name] if isinstance(sources[name], Path) else sources[name]) for name in self._images)
            firsts = dict[Hashable, int]()
            first_alike = np.array([firsts.setdefault(key, place) for place, key in enumerate(known)], np.int64)
        for split in self._splits.values():
            split.finish(first_alike)
        order = sorted(self._splits, key=lambda name: (name != "train", name != "val", name))
        pairs = [(one, other) for place, one in enumerate(order) for other in order[place + 1 :]]
        found = [line for one, other in pairs if (line := self._compared(one, other, first_alike))]
        self.close()
        return found

    def close(self) -> None:
        """Gives up what lies on disk."""
        for split in self._splits.values():
            split.close()

    def _compared(self, one: str, other: str, first_alike: np.ndarray) -> str | None:
        here, there = self._splits[one], self._splits[other]
        images, repeated = here.shown & there.shown, here.repeated_in(there)
        if not images.any() and not repeated:
            return None
        told = (
            f"{repeated} of the {len(there)} sample(s) of '{other}' ask what a sample of '{one}' asks about the same "
            "image(s), or about none"
        )
        if images.any():
            told = (
                f"{images.sum()} of the {there.shown.sum()} image(s) of '{other}' are in '{one}' too, by their "
                f"bytes; {there.showing(images[first_alike])} sample(s) show them, and {told}"
            )
        return f"splits '{one}' and '{other}' overlap, and were left so: {told}"


class _Asked:
    """What a split's samples show and ask, in columns: of each sample a hash of what is asked, and its images."""

    def __init__(self, folder: Path) -> None:
        self._hashes, self._counts, self._refs, self._keys = (
            Column(folder, kind) for kind in (np.uint64, np.int32, np.int32, np.uint64)
        )
        self._pending = array("Q"), array("i"), array("i")
        self.shown = np.empty(0, bool)

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, asked: str, refs: list[int]) -> None:
        hashes, counts, pending_refs = self._pending
        hashes.append(xxhash.xxh3_64_intdigest(asked.encode("utf-8", "surrogatepass")))
        counts.append(len(refs))
        pending_refs.extend(refs)
        if len(hashes) == AT_ONCE:
            self._write()

    def _write(self) -> None:
        for column, values in zip((self._hashes, self._counts, self._refs), self._pending, strict=True):
            column.extend(values)
            del values[:]

    def finish(self, first_alike: np.ndarray) -> None:
        """Fills `shown`, bool [images], and the keys by which samples are compared. `first_alike` int [images]: the
        first that is the same as each."""
        self._write()
        self.shown = np.zeros(len(first_alike), bool)
        hashes = self._hashes.values()
        for part, starts, refs in self._parts():
            same = first_alike[refs]
            self.shown[same] = True
            self._keys.extend(_keys(hashes[part], starts, same))

    def showing(self, wanted: np.ndarray) -> int:
        """How many samples show one of the images for which bool [images] says so."""
        found = 0
        for _, starts, refs in self._parts():
            before = np.concatenate([[0], np.cumsum(wanted[refs])])
            found += int((before[starts[1:]] > before[starts[:-1]]).sum())
        return found

    def repeated_in(self, other: _Asked) -> int:
        """How many samples of `other` ask what one of these asks. The keys of the smaller split are held, one range of
        values after the other, and those of the larger one are looked up."""
        mine, theirs = self._keys.values(), other._keys.values()
        held, looked_up = (mine, theirs) if len(mine) < len(theirs) else (theirs, mine)
        ranges = 1 + len(held) // _HELD
        found = 0
        for number in range(ranges):
            keys, counts = np.unique(_in_range(held, number, ranges), return_counts=True)
            is_met = np.zeros(len(keys), bool)
            for part in in_slices(len(looked_up) if len(keys) else 0):
                places = np.minimum(np.searchsorted(keys, looked_up[part]), len(keys) - 1)
                places = places[keys[places] == looked_up[part]]
                is_met[places] = True
                found += len(places) if looked_up is theirs else 0
            found += int(counts[is_met].sum()) if held is theirs else 0
        return found

    def close(self) -> None:
        for column in (self._hashes, self._counts, self._refs, self._keys):
            column.close()

    def _parts(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(samples, int64 [m + 1] where their images begin in the next, int32 images), part by part."""
        counts, refs, first = self._counts.values(), self._refs.values(), 0
        for part in in_slices(len(self)):
            starts = np.concatenate([[0], np.cumsum(counts[part], dtype=np.int64)])
            yield part, starts, refs[first : first + starts[-1]]
            first += int(starts[-1])


def _keys(hashes: np.ndarray, starts: np.ndarray, refs: np.ndarray) -> np.ndarray:
    """uint64 [m], equal for samples that ask the same about the same images in the same order: the hash of what is
    asked, plus a polynomial of the images' numbers. `starts` int64 [m + 1]: where each sample's are in `refs`."""
    places = np.arange(len(refs)) - np.repeat(starts[:-1], np.diff(starts))
    terms = (refs.astype(np.uint64) + np.uint64(1)) * _BASE ** (places.astype(np.uint64) + np.uint64(1))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])  # which wrap around, as their differences do
    return hashes + sums[starts[1:]] - sums[starts[:-1]]


def _in_range(keys: np.ndarray, number: int, ranges: int) -> np.ndarray:
    """Those keys that fall into one of so many equal ranges of values."""
    first, last = (np.uint64(min(2**64 * bound // ranges, 2**64 - 1)) for bound in (number, number + 1))
    chosen = [keys[:0]]
    for part in in_slices(len(keys)):
        is_last = number + 1 == ranges
        chosen.append(keys[part][(keys[part] >= first) & ((keys[part] < last) | is_last)])
    return np.concatenate(chosen)
