"""Mean loss by category of sample, for the loggers: `train/loss_by_subject/natural science`.

A sample's categories are what its line of JSONL says: the texts of its metadata under `KEYS`, and whether it shows
images. Packs do not hold them, so the file of samples is read once, by a thread of rank 0 while the first steps go on;
packs without such a file, or whose samples all are of one kind, have none, and nothing is logged.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vltrain.errors import InputError
from vltrain.files.strict_json import is_object, read_lines

logger = logging.getLogger(__name__)

KEYS = ("source", "category", "subject", "topic", "kind", "question_type", "answer_type", "grade")
MOST_VALUES = 40  # of a key: with more it is no category


@dataclass(frozen=True, kw_only=True)
class Categories:
    """Of the samples of a file, 12 bytes each.

    hashes: uint64 [n], of their ids, sorted; codes: int32 [n], places in `values`: category by key of a kind of sample.
    """

    hashes: np.ndarray
    codes: np.ndarray
    values: list[dict[str, str]]

    def of(self, sample_ids: Sequence[str]) -> list[Mapping[str, str]]:
        """Category by key of each sample; {} for one that is not in the file."""
        if len(self.hashes) == 0:
            return [{}] * len(sample_ids)
        wanted = np.array([_hashed(name) for name in sample_ids], np.uint64)
        places = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        known = (self.hashes[places] == wanted).tolist()
        codes = self.codes[places].tolist()
        return [self.values[code] if found else {} for code, found in zip(codes, known, strict=True)]


def _hashed(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def read_categories(files: Mapping[str, Path]) -> Categories:
    """Of files of samples, each with what stands before its ids. Raises InputError as
    `vltrain.files.strict_json.read_lines`."""
    hashes, codes = array("Q"), array("i")
    kinds: dict[tuple[tuple[str, str], ...], int] = {}
    found = ((before, record) for before, path in files.items() for _, record in read_lines(path, "samples"))
    for before, record in found:
        if is_object(record) and "id" in record:
            hashes.append(_hashed(f"{before}{record['id']}"))
            codes.append(kinds.setdefault(tuple(_categories_of(record)), len(kinds)))
    values: dict[str, set[str]] = defaultdict(set)
    for kind in kinds:
        for key, value in kind:
            values[key].add(value)
    telling = {key for key, found in values.items() if 2 <= len(found) <= MOST_VALUES}
    order = np.argsort(np.frombuffer(hashes, np.uint64)) if hashes else np.empty(0, np.int64)
    return Categories(
        hashes=np.array(hashes, np.uint64)[order],
        codes=np.array(codes, np.int32)[order],
        values=[{key: value for key, value in kind if key in telling} for kind in kinds],
    )


def _categories_of(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    found = record.get("metadata")
    metadata = found if is_object(found) else {}
    for key in KEYS:
        value = metadata.get(key)
        if type(value) is str and value.strip():
            yield key, value
    yield "images", "with" if record.get("images") else "without"


class CategoryLosses:
    """Takes each step's losses, and gives the means of the last steps' where they are logged.

    Args:
        samples: the files that the packs were made of, by what stands before their samples' ids in the packs (SET/ of
            a mixture); none: nothing is given.
        ids_of: step -> ids of its samples, in the history's order.
        every: steps between two means.
        first_step: of this life of the run; recent: losses of those of its interval that are behind it.
    """

    def __init__(
        self,
        samples: Mapping[str, Path],
        ids_of: Callable[[int], Sequence[str]],
        *,
        every: int,
        first_step: int = 0,
        recent: Sequence[np.ndarray] = (),
    ) -> None:
        self._ids_of, self._every = ids_of, every
        self._kept = list(enumerate(recent, start=first_step - len(recent)))
        self._reading = _Reading(samples) if samples else None  # begins with the first step
        self._said = ""

    def add(self, step: int, losses: np.ndarray) -> dict[str, float]:
        """Takes a step. `losses`: of its samples, see `vltrain.receipts.history`.

        Returns: at every `every`-th step the means by category, over the samples of the steps since the last time, of
        the loss per label token; else {}.
        """
        if self._reading is None:
            return {}
        self._reading.begin()
        self._kept.append((step, losses))
        if (step + 1) % self._every:
            return {}
        kept, self._kept = self._kept, []
        categories = self._reading.result()
        if categories is None:
            self._reading = None
            return {}
        found: dict[str, list[float]] = defaultdict(list)
        for number, values in kept:
            for known, loss in zip(categories.of(self._ids_of(number)), values.tolist(), strict=True):
                for key, value in known.items() if loss == loss else ():  # not of a sample without labels
                    found[f"train/loss_by_{key}/{value}"].append(loss)
        means = {name: sum(values) / len(values) for name, values in sorted(found.items())}
        several = f"steps {kept[0][0]} to {step}" if len(kept) > 1 else f"step {step}"
        said = {name.removeprefix("train/loss_by_"): (mean, len(found[name])) for name, mean in means.items()}
        told = ", ".join(f"{name} {mean:.4g} ({count})" for name, (mean, count) in said.items())
        self._said = f"mean loss by category (samples), {several}: {told}" if told else ""
        return means

    def describe(self) -> str:
        """The newest means in words, once; empty where there are no new ones."""
        said, self._said = self._said, ""
        return said


class _Reading(threading.Thread):
    """Reads categories beside the training. An end of the process does not wait for it."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__(name="categories of samples", daemon=True)
        self._files = files
        self._found: Categories | None = None
        self._error: InputError | None = None

    def begin(self) -> None:
        """Starts the thread, the first time."""
        if self.ident is None:
            self.start()

    def run(self) -> None:
        try:
            self._found = read_categories(self._files)
        except InputError as error:
            self._error = error

    def result(self) -> Categories | None:
        """Waits for them; None, with a warning, where the file cannot be read: training goes on without."""
        self.join()
        if self._error is not None:
            logger.warning("losses by category are not logged: %s", self._error)
        return self._found
