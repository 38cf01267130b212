"""Where tokenised samples wait for their packs: on disk, all but the names of their distinct images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.tokens import Tokens
from vltrain.data.batching import batch_lengths
from vltrain.data.flat.columns import Column, Texts, in_slices
from vltrain.data.flat.unique_ids import UniqueIds
from vltrain.data.packing import pack_lengths
from vltrain.data.stream.permutation import permute
from vltrain.data.text.spelling import Spelling, describe_lost
from vltrain.errors import InputError
from vltrain.schema import PackedRow

MOST_AT_ONCE = 1 << 18  # samples that are assigned to packs together
_FLAT = dict.fromkeys(("input_ids", "instruction_ids", "position_ids", "blocks"), np.int32)

_NONE = np.empty(0, np.int32)

logger = logging.getLogger(__name__)


class Spool:
    """All tokenised samples, on the disk of the folder that is written.

    lengths [n] tokens, num_labels [n] of them predicted, num_images [n], instruction_lengths [n], int32; `paths` are
    the distinct image paths, `image_refs` each sample's, one after another, `image_tokens` their placeholders where
    they differ.
    """

    def __init__(self, folder: Path, *, counts_matter: bool = False) -> None:
        """`counts_matter`: an image that stands alone in its sample is another than one of several."""
        self._folder, self._counts_matter = folder, counts_matter
        self._position_rows = 0
        self.ids = Texts(folder)
        self.paths: dict[str, int] = {}
        self.spelling = Spelling()

    def fill(self, parts: Iterable[Tokens]) -> None:
        """Takes all samples; InputError if there is none or an id comes twice."""
        folder = self._folder
        flat = {**{name: Column(folder, kind) for name, kind in _FLAT.items()}, "loss_mask": Column(folder, np.bool_)}
        names = ("lengths", "num_labels", "instruction_lengths", "image_tokens", "num_images", "image_refs")
        columns = {name: Column(folder, np.int32) for name in names}
        unique, cuts = UniqueIds(folder, "unique"), 0
        for part in parts:
            unique.add_all(part.ids)
            self.ids.extend(part.ids)
            for name, column in flat.items():
                column.write(getattr(part, name))
            for name in names[:4]:
                columns[name].extend(getattr(part, name))
            columns["num_images"].extend([len(images) for images in part.images])
            columns["image_refs"].extend(self._refs_of(part))
            self._position_rows = max(self._position_rows, part.position_rows)
            cuts += part.instruction_cuts
            self.spelling.merge(part.spelling)
        if not len(self.ids):
            raise InputError("the file of samples is empty; there is nothing to pack")
        unique.finish(lambda: self.ids)
        self._warn(cuts)
        self.lengths, self.num_labels, self.instruction_lengths, self.image_tokens, self.num_images, self.image_refs = (
            column.finish() for column in columns.values()
        )
        self._starts, self._instruction_starts, self._image_starts = (
            _starts(folder, counts) for counts in (self.lengths, self.instruction_lengths, self.num_images)
        )
        self._flat = {name: column.finish() for name, column in flat.items()}

    def _refs_of(self, part: Tokens) -> list[int]:
        paths = self.paths
        return [paths.setdefault(path, len(paths)) for images in part.images for path in images]

    def _warn(self, cuts: int) -> None:
        if cuts:
            told = (
                "of %d prompts the Q-Former reads only the beginning (--qformer-tokens, in a recipe "
                "model.instructblip.qformer_tokens)"
            )
            logger.warning(told, cuts)
        for line in describe_lost(self.spelling.for_manifest(), len(self.ids)):
            logger.warning("%s", line)

    def assign(
        self, kept: np.ndarray, pack_length: int, max_images: int | None, seed: int, *, padded: bool
    ) -> Iterator[np.ndarray]:
        """Which of the samples `kept` share a pack, or a padded batch: int64 [S] of each, see
        `vltrain.data.packing.pack_lengths`. Samples are assigned window by window."""
        for number, places in enumerate(windows(len(kept), seed)):
            samples = kept[places]
            order, starts = self._together(samples, pack_length, max_images, seed + number, padded=padded)
            for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                yield samples[order[begin:end]]

    def _together(
        self, samples: np.ndarray, pack_length: int, max_images: int | None, seed: int, *, padded: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        lengths, images = self.lengths[samples], self.num_images[samples]
        if not padded:
            return pack_lengths(lengths, pack_length, images, max_images, seed)
        answers = self.num_labels[samples]
        return batch_lengths(lengths - answers, answers, pack_length, images, max_images, seed)

    def select(
        self,
        choose: Callable[[np.ndarray, np.ndarray], np.ndarray],
        drawn: Callable[[list[str]], np.ndarray] | None = None,
    ) -> np.ndarray:
        """int64, the numbers of the samples that are chosen by their lengths and numbers of images (bool [m] of int32
        [m]), and then by their ids (bool [m]), mapped."""
        chosen = Column(self._folder, np.int64)
        for part in in_slices(len(self.ids)):
            rows = part.start + np.flatnonzero(choose(self.lengths[part], self.num_images[part]))
            chosen.extend(rows if drawn is None else rows[drawn(self.ids.of(rows))])
        return chosen.finish()

    def refs(self, samples: np.ndarray) -> np.ndarray:
        """Which of `paths` some samples show, one after another, int32."""
        return self.image_refs[_ranges(self._image_starts[samples], self.num_images[samples])]

    def row(self, samples: np.ndarray, image_ids: np.ndarray) -> PackedRow:
        """The pack of some samples. `image_ids` int64 [paths]: the stored image behind each path."""
        starts, lengths = self._starts[samples], self.lengths[samples]
        places = _ranges(starts, lengths)
        return PackedRow(
            input_ids=self._flat["input_ids"][places],
            loss_mask=self._flat["loss_mask"][places],
            segment_lengths=lengths,
            sample_ids=tuple(self.ids.of(samples)),
            position_ids=self._positions(starts, lengths),
            blocks=self._flat["blocks"][places] if len(self._flat["blocks"]) else _NONE,
            **self._instructions(samples),
            **self._shown(samples, image_ids),
        )

    def _instructions(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        instructions = self._flat["instruction_ids"]
        if not len(instructions):
            return {}
        lengths = self.instruction_lengths[samples]
        places = _ranges(self._instruction_starts[samples], lengths)
        return {"instruction_ids": instructions[places], "instruction_lengths": lengths if lengths.any() else _NONE}

    def _positions(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int32 [R, T], [0, 0] where there is none: each sample's rows lie together on disk."""
        rows = self._position_rows
        if not rows:
            return np.empty((0, 0), np.int32)
        spans = [slice(rows * start, rows * (start + length)) for start, length in zip(starts, lengths)]
        return np.concatenate([self._flat["position_ids"][span].reshape(rows, -1) for span in spans], axis=1)

    def _shown(self, samples: np.ndarray, image_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The images of a pack: each once; where that matters, those that stand alone in a sample apart and first."""
        counts = self.num_images[samples]
        runs = _ranges(self._image_starts[samples], counts)
        most = len(image_ids) + 1
        keys = image_ids[self.image_refs[runs]] + most
        if self._counts_matter:
            keys += most * (np.repeat(counts, counts) > 1)
        listed = keys.tolist()  # of a few, for which sorting arrays takes ten times as long
        order = sorted(set(listed))
        slots = {key: slot for slot, key in enumerate(order)}
        distinct = np.array(order, np.int64)
        found = {
            "image_ids": distinct % most,
            "image_slots": np.array([slots[key] for key in listed], np.int32),
        }
        if len(self.image_tokens):
            first_runs = runs[[listed.index(key) for key in order]] if order else runs
            found["image_tokens"] = self.image_tokens[first_runs]
            found["image_counts"] = (distinct // most).astype(np.int32)
        return found

    def close(self) -> None:
        """Gives up what lies on disk."""
        self._flat = {}
        self.ids.close()


def windows(count: int, seed: int) -> Iterator[np.ndarray]:
    """Which of so many samples are assigned to packs together: int64 [m] of each window, ascending. Of more than
    MOST_AT_ONCE each window is drawn from all over the set, by a permutation that is computed where it is looked at."""
    number = -(-count // MOST_AT_ONCE)
    bounds = [count * bound // number for bound in range(number + 1)] if number else []
    for first, last in itertools.pairwise(bounds):
        places = np.arange(first, last)
        # Ascending, since where they lie is read faster so; what packs them shuffles them.
        yield places if number == 1 else np.sort(permute(places, count, seed, 0))


def _starts(folder: Path, counts: np.ndarray) -> np.ndarray:
    """int64 [n], where each of consecutive runs begins, mapped."""
    starts, first = Column(folder, np.int64), 0
    for part in in_slices(len(counts)):
        ends = first + np.cumsum(counts[part], dtype=np.int64)
        starts.extend(ends - counts[part])
        first = int(ends[-1])
    return starts.finish()


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + 1, ... counts[0] of them, starts[1], ...], int64."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
