"""What a run's history says of its samples: when each was seen, with which loss, and which stand out.

A sample is a place: a pack and a segment in it. Losses are means per label token, in nats.

    suspicion   the mean, over a sample's passes, of how far its loss lay above the median of its step. A wrong label
                stays far above what the step's other samples have learned, pass after pass, while all losses are high
                together early on, where the difference says little and is small. Found with it, of easy-VQA with
                answers swapped: see `launch/BLAME.md`
    forgotten   a sample that the model gave more probability than not (a loss below ln 2), and in its last pass
                less: by how far its loss rose since its lowest

Trade-off: a hard sample looks like a wrong one; a model that has learned its wrong labels by heart hides them from the
later passes, not from the mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vltrain.data.flat.index import Index
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.receipts.history import History
from vltrain.receipts.receipt import Header
from vltrain.receipts.verify import plan_of
from vltrain.train.guard import LEAST_STEPS, WINDOW_STEPS

RIGHT = math.log(2)
"""Nats: below, the label tokens are more likely than not."""


class Place(NamedTuple):
    """A sample, by its pack and its segment in it."""

    pack: int
    segment: int


class Seen(NamedTuple):
    """Once that a sample was trained on: in which step, and the mean loss per label token of it."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of each sample of the packs, N in the order of packs and segments.

    passes: int32 [N], how often it was seen with a loss; suspicion: float64 [N], see the module; rise: float32 [N], the
    last loss less the lowest before, NaN of one seen less than twice; lowest, last: float32 [N].
    """

    passes: np.ndarray
    suspicion: np.ndarray
    lowest: np.ndarray
    last: np.ndarray

    @property
    def rise(self) -> np.ndarray:
        return self.last - self.lowest

    def suspects(self) -> np.ndarray:
        """int64, the samples that were seen, the most suspicious first; equal ones in the order of the packs."""
        seen = np.flatnonzero(self.passes > 0)
        return seen[np.argsort(-np.nan_to_num(self.suspicion[seen], nan=-np.inf), kind="stable")]

    def forgotten(self) -> np.ndarray:
        """int64, the samples that were forgotten, the largest rise first."""
        found = np.flatnonzero((self.passes > 1) & (self.lowest < RIGHT) & (self.last > RIGHT))
        return found[np.argsort(-self.rise[found], kind="stable")]


class SampleHistory:
    """A run's history by samples.

    Raises: InputError where its steps are not of these packs.
    """

    def __init__(self, history: History, header: Header, dataset: PackedDataset) -> None:
        index: Index = dataset.index
        self._plan = plan_of(header, dataset)
        self._history = history
        self._lengths = index.num_samples.astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self.steps = range(history.first_step, history.first_step + history.num_steps)
        if self.steps and self.steps[-1] >= self._plan.num_steps:
            raise InputError(f"{history.path}: holds step {self.steps[-1]}, the run has {self._plan.num_steps} steps")

    @property
    def num_samples(self) -> int:
        return int(self._starts[-1])

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self._plan.num_steps

    def place(self, sample: int) -> Place:
        """Where the sample of that number is, in the order of packs and segments."""
        pack = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return Place(pack, sample - int(self._starts[pack]))

    def number(self, place: Place) -> int:
        """The inverse of `place`."""
        return int(self._starts[place.pack]) + place.segment

    def losses(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(packs int64 [m], losses float32 [samples of the step]) of a step. Raises InputError where they don't fit."""
        packs, losses = self._plan.packs_of(step), self._history.losses(step)
        if len(losses) != int(self._lengths[packs].sum()):
            expected = int(self._lengths[packs].sum())
            raise InputError(
                f"{self._history.path}: step {step}: {len(losses)} losses, its packs have {expected} samples; the file "
                "was changed, or is another run's"
            )
        return packs, losses

    def _passes_of(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of samples, losses) of a step; of one that reaches into another pass over the data each by itself,
        so that no sample comes twice."""
        packs, losses = self.losses(step)
        lengths = self._lengths[packs]
        ends = np.cumsum(lengths)
        numbers = np.repeat(self._starts[packs] - (ends - lengths), lengths) + np.arange(len(losses))
        _, passes = self._plan.passes_of(step)
        for one in np.unique(passes):
            inside = np.repeat(passes == one, lengths)
            yield numbers[inside], losses[inside]

    def scores(self) -> Scores:
        """Of all samples. Reads the whole history once."""
        num = self.num_samples
        passes, above = np.zeros(num, np.int32), np.zeros(num, np.float64)
        lowest, last = np.full(num, np.inf, np.float32), np.full(num, np.nan, np.float32)
        for step in self.steps:
            typical = _median(self.losses(step)[1])
            for numbers, losses in self._passes_of(step):
                known = ~np.isnan(losses)
                numbers, losses = numbers[known], losses[known]
                lowest[numbers] = np.fmin(lowest[numbers], last[numbers])
                last[numbers] = losses
                passes[numbers] += 1
                above[numbers] += losses - typical
        suspicion = np.divide(above, passes, out=np.full(num, np.nan), where=passes > 0)
        return Scores(passes=passes, suspicion=suspicion, lowest=lowest, last=last)

    def seen(self, places: Collection[Place]) -> Mapping[Place, list[Seen]]:
        """Each time that each of the samples was seen, in order of steps."""
        wanted = {self.number(place): place for place in places}
        found: dict[Place, list[Seen]] = {place: [] for place in places}
        packs = np.unique([place.pack for place in places])
        for step in self.steps:
            if not np.isin(self._plan.packs_of(step), packs).any():
                continue
            for numbers, losses in self._passes_of(step):
                for number, loss in zip(numbers.tolist(), losses.tolist(), strict=True):
                    if number in wanted:
                        found[wanted[number]].append(Seen(step, loss))
        return found


def _median(losses: np.ndarray) -> float:
    """Of what is a number; 0 where nothing is."""
    known = losses[~np.isnan(losses)]
    return float(np.median(known)) if len(known) else 0.0


def spike(losses: Mapping[int, float]) -> tuple[int, float, float]:
    """(step, its loss, mean of those before) of the step that jumps most: whose loss is the largest multiple of the
    mean of the up to `WINDOW_STEPS` finite losses before it, `LEAST_STEPS` at least; one that is not finite jumps
    furthest.

    Args: losses: by step.

    Raises: InputError for fewer steps.
    """
    recent: list[float] = []
    best, found = -math.inf, None
    for step, loss in sorted(losses.items()):
        if len(recent) >= LEAST_STEPS:
            mean = sum(recent) / len(recent)
            jump = loss / mean if math.isfinite(loss) and mean > 0 else math.inf if not math.isfinite(loss) else 0.0
            if jump > best:
                best, found = jump, (step, loss, mean)
        if math.isfinite(loss):
            recent = [*recent[-(WINDOW_STEPS - 1) :], loss]
    if found is None:
        raise InputError(f"--spike: the run's log has {len(losses)} steps, expected more than {LEAST_STEPS}")
    return found
