"""Ids that may come once: the newest are known, those before by hashes on disk.

A duplicate among the newest is refused at once. The hashes of the others are compared once all are there: they lie in
sorted runs, of which one range of values after the other is merged, so that memory stays that of a run. Hashes only
raise suspicion: the ids themselves are compared before anything is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from vltrain.data.flat.columns import Column
from vltrain.errors import InputError

NEWEST = 1 << 17
_hash = xxhash.xxh3_64_intdigest


class UniqueIds:
    """All ids of a data set. `expected`: how they must be, for the message."""

    def __init__(self, place: Path, expected: str) -> None:
        """`place`: a folder on the disk that is written to; nothing is written for up to NEWEST ids."""
        self._place, self._expected = place, expected
        self._newest: set[str] = set()
        self._hashes: Column | None = None
        self._run_lengths: list[int] = []

    def add(self, sample_id: str) -> None:
        """Raises InputError if the id is one of the newest."""
        newest = self._newest
        if sample_id in newest:
            raise self._twice(sample_id)
        newest.add(sample_id)
        if len(newest) >= NEWEST:
            self._write_run()

    def add_all(self, ids: Sequence[str]) -> None:
        """`add` of each."""
        for one in ids:
            self.add(one)

    def finish(self, ids: Callable[[], Iterable[str]]) -> None:
        """Compares all ids. `ids` gives them once more, in the same order: asked for only where two may be equal.

        Raises: InputError for the first that comes a second time.
        """
        if self._hashes is None:
            return
        self._write_run()
        suspects, met = self._repeated(), set[str]()
        self._hashes.close()
        if not suspects:
            return
        for one in ids():
            if _hash(one.encode()) in suspects:
                if one in met:
                    raise self._twice(one)
                met.add(one)

    def _twice(self, sample_id: str) -> InputError:
        return InputError(f"sample id '{sample_id}' comes twice; ids must be {self._expected}")

    def _write_run(self) -> None:
        run = np.fromiter((_hash(one.encode()) for one in self._newest), np.uint64, len(self._newest))
        run.sort()
        try:
            if self._hashes is None:
                self._hashes = Column(self._place, np.uint64)
            self._hashes.extend(run)
        except OSError as error:
            raise InputError(f"{self._place}: could not be written ({error}); nothing was left there") from error
        self._run_lengths.append(len(run))
        self._newest.clear()

    def _repeated(self) -> set[int]:
        """Hashes that come more than once. Ranges are as many as runs, so that each holds about as many as one."""
        assert self._hashes is not None
        hashes, num_runs = self._hashes.values(), len(self._run_lengths)
        runs = np.split(hashes, np.cumsum(self._run_lengths[:-1]))
        bounds = np.array([(number << 64) // num_runs for number in range(1, num_runs)], np.uint64)
        cuts = [[0, *np.searchsorted(run, bounds).tolist(), len(run)] for run in runs]
        found: set[int] = set()
        for number in range(num_runs):
            together = np.concatenate([run[cut[number] : cut[number + 1]] for run, cut in zip(runs, cuts, strict=True)])
            together.sort()
            found.update(together[1:][together[1:] == together[:-1]].tolist())
        return found
