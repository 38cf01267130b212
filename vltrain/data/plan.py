"""Which packs a step trains on, and which rank takes which: a pure function of (seed, epochs, step).

Packs form one endless stream (`vltrain.data.stream`): of one set, position p is pack permute(p mod n) of epoch p // n,
and step k takes positions [kB, (k + 1)B). So the global batch is the same at any number of ranks, resuming is a step
number, and nothing is stored per pack: the permutation is computed at the positions asked for. The costs in the index
decide who takes what: packs of similar cost meet in one micro-step, since ranks wait for each other there, and the
ranks' totals are evened out. Trade-off: perfect balance (costs are a model's estimate), and equal micro-steps where the
number of packs is no multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import numpy as np

from vltrain.data.flat.index import Index
from vltrain.data.stream.mixing import Mixing
from vltrain.errors import InputError

FILLER = -1  # stands for no pack


@dataclass(frozen=True, kw_only=True)
class PackCost:
    """Cost of a pack in any unit: a pair is a (query, key) inside one segment, so a pack has `sum_squares` of them.

    per_image  of an image of some size
    per_label  of a label token
    images     packs, int64 [m] -> float64 [m]: as many images of that size as cost what theirs do; None: all are of it
    """

    per_token: float = 1.0
    per_pair: float = 0.0
    per_image: float = 0.0
    per_label: float = 0.0
    images: Callable[[np.ndarray], np.ndarray] | None = None

    def of(self, index: Index, packs: np.ndarray, sized_images: np.ndarray | None = None) -> np.ndarray:
        """float64 [m], the cost of each pack of int64 [m]. `sized_images`: theirs, where they are known."""
        images = self.sized_images(index, packs) if sized_images is None else sized_images
        return (
            self.per_token * index.num_tokens[packs]
            + self.per_pair * index.sum_squares[packs]
            + self.per_image * images
            + self.per_label * index.num_label_tokens[packs]
        )

    def sized_images(self, index: Index, packs: np.ndarray) -> np.ndarray:
        """float64 [m], as many images of the size that this is of as would cost what each pack's do."""
        return index.num_images[packs].astype(np.float64) if self.images is None else self.images(packs)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step over all ranks: G micro-steps of W ranks.

    packs             int64 [G, W]  pack numbers, -1 where a rank has none
    first_samples     int64 [G, W]  where the pack's samples begin among all of the step, which are counted in the
                                    stream's order (`Plan.packs_of`); 0 where a rank has none
    has_images        bool  [G]     whether any rank has an image in that micro-step
    num_label_tokens                of the whole step: what the loss is divided by
    num_tokens                      of the whole step, all of them useful
    num_pairs                       (query, key) pairs inside segments, of the whole step
    num_images                      of the whole step, one that several segments show counted once
    sized_images                    as many of the size that the plan's cost is of would cost as much as these
    num_samples                     of the whole step
    """

    step: int
    packs: np.ndarray
    first_samples: np.ndarray
    has_images: np.ndarray
    num_label_tokens: int
    num_tokens: int
    num_pairs: int
    num_images: int
    sized_images: float
    num_samples: int


def length_of(mixing: Mixing, epochs: float, packs_per_step: int, max_steps: int | None) -> tuple[int, int]:
    """Packs (one a time for each pass) and steps of a run; a pack and a step at least."""
    positions = mixing.positions(epochs)
    whole = -(-positions // packs_per_step)
    return positions, whole if max_steps is None else min(whole, max_steps)


class Plan:
    """All steps of a run. Holds the index only, which is memory-mapped."""

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        epochs: float,
        packs_per_step: int,
        world_size: int,
        cost: PackCost,
        max_steps: int | None = None,
        images_always: bool = False,
    ) -> None:
        """Args:
        epochs: passes over the packs, not necessarily whole ones.
        max_steps: ends the run earlier.
        images_always: let every micro-step reach the ViT, with a blank image where there is none. Optimizer offload
            needs that, which takes a gradient over in a step's last micro-step alone, and of those parameters alone
            that this one reaches; and so does a model of which text reaches nothing trained, whose loss would have no
            gradient.

        Raises: InputError for a set without packs.
        """
        if len(index) == 0:
            raise InputError("there are no packs to train on")
        assert packs_per_step >= 1 and world_size >= 1 and epochs > 0
        self._index, self._seed, self._cost = index, seed, cost
        self._packs_per_step, self._world_size, self._images_always = packs_per_step, world_size, images_always
        self.mixing = index.mixing
        assert sum(self.mixing.num_packs) == len(index)
        self.num_positions, self.num_steps = length_of(self.mixing, epochs, packs_per_step, max_steps)
        self.steps_per_epoch = self.mixing.epoch / packs_per_step

    @property
    def num_trained(self) -> int:
        """Packs of all steps together, one a time for each pass."""
        return min(self.num_positions, self.num_steps * self._packs_per_step)

    def balanced_by(self, cost: PackCost) -> Plan:
        """The same steps, assigned to ranks by another cost."""
        other = copy(self)
        other._cost = cost
        return other

    def packs_of(self, step: int) -> np.ndarray:
        """Pack numbers of a step, int64 [packs_per_step, or fewer in the last step], in the stream's order."""
        return self.mixing.packs(self._positions(step), self._seed)

    def passes_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(the set, the pass over it) that each of `packs_of` is of: int64, as many."""
        sets, own = self.mixing.split(self._positions(step))
        return sets, own // np.array(self.mixing.num_packs, np.int64)[sets]

    def counts_by_set(self, packs: np.ndarray) -> np.ndarray:
        """How many packs, samples and tokens of each set are among these packs, int64 [3, sets]."""
        sets, size = self.mixing.set_of(packs), len(self.mixing.names)
        of_packs = (np.ones(len(packs)), self._index.num_samples[packs], self._index.num_tokens[packs])
        return np.stack([np.bincount(sets, weights=one, minlength=size) for one in of_packs]).astype(np.int64)

    def _positions(self, step: int) -> np.ndarray:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        first = step * self._packs_per_step
        return np.arange(first, min(first + self._packs_per_step, self.num_positions), dtype=np.int64)

    def step(self, number: int) -> StepPlan:
        """The packs of a step, assigned to micro-steps and ranks."""
        packs = self.packs_of(number)
        index = self._index
        sized_images = self._cost.sized_images(index, packs)
        places = self._assign(packs, self._cost.of(index, packs, sized_images))
        grid = np.where(places == FILLER, FILLER, packs[places])
        sizes = index.num_samples[packs].astype(np.int64)
        return StepPlan(
            step=number,
            packs=grid,
            first_samples=np.where(places == FILLER, 0, (np.cumsum(sizes) - sizes)[places]),
            has_images=self.reads_images(grid),
            num_label_tokens=int(index.num_label_tokens[packs].sum()),
            num_tokens=int(index.num_tokens[packs].sum()),
            num_pairs=int(index.sum_squares[packs].sum()),
            num_images=int(index.num_images[packs].sum()),
            sized_images=float(sized_images.sum()),
            num_samples=int(sizes.sum()),
        )

    def reads_images(self, packs: np.ndarray) -> np.ndarray:
        """bool [G], whether any rank reads images in a micro-step of these packs, int64 [G, W]: then all do."""
        shown = (packs != FILLER) & (self._index.num_images[packs] > 0)
        return shown.any(axis=1) | self._images_always

    def _assign(self, packs: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """int64 [G, W], places in `packs`: of packs with images first, each micro-step of similar costs, fillers last;
        then ranks evened out."""
        world_size = self._world_size
        has_image = self._index.num_images[packs] > 0
        by_cost = np.lexsort((packs, -costs, ~has_image))
        missing = -len(packs) % world_size
        grid = np.concatenate([by_cost, np.full(missing, FILLER)]).reshape(-1, world_size)
        grid_costs = np.concatenate([costs[by_cost], np.zeros(missing)]).reshape(-1, world_size)
        totals = np.zeros(world_size)
        for micro_step, micro_costs in enumerate(grid_costs):
            # The most expensive pack of a micro-step goes to the rank that has had the least so far.
            ranks_by_load, packs_by_cost = np.argsort(totals, kind="stable"), np.argsort(-micro_costs, kind="stable")
            grid[micro_step, ranks_by_load] = grid[micro_step, packs_by_cost]
            totals[ranks_by_load] += micro_costs[packs_by_cost]
        return grid
