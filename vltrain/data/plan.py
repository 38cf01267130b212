"""Which packs a step trains on, and which rank takes which: a pure function of (seed, epochs, step).

Packs form one endless stream: position p is pack permute(p mod n) of epoch p // n, and step k takes positions [kB, (k +
1)B). So the global batch is the same at any number of ranks, resuming is a step number, and nothing is stored per pack:
the permutation is computed at the positions asked for. The costs in the index decide who takes what: packs of similar
cost meet in one micro-step, since ranks wait for each other there, and the ranks' totals are evened out. Trade-off:
perfect balance (costs are a model's estimate), and equal micro-steps where the number of packs is no multiple of the
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import numpy as np

from vltrain.data.shards import Index
from vltrain.errors import InputError

FILLER = -1  # stands for no pack
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every input bit changes every output bit. uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    state = np.array([seed & (2**64 - 1)], np.uint64)
    state = _mix(_mix(state + _GOLDEN) + np.array([epoch], np.uint64) * _GOLDEN)
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random permutation of range(n), evaluated at `positions` only.

    A Feistel network permutes the smallest range of 2^(2b) >= n numbers; a result outside range(n) goes through it
    again until it falls inside (cycle walking: Black and Rogaway, 2002), fewer than four times on average.

    Args:
        positions: int [m], each in [0, n).

    Returns:
        int64 [m], each in [0, n).
    """
    positions = np.asarray(positions, np.int64)
    assert n >= 1 and (len(positions) == 0 or 0 <= positions.min() <= positions.max() < n)
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = _round_keys(seed, epoch)
    result = positions.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        left, right = result[walking] >> shift, result[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= n]
    return result.astype(np.int64)


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


def length_of(num_packs: int, epochs: float, packs_per_step: int, max_steps: int | None) -> tuple[int, int]:
    """Packs (one a time for each pass) and steps of a run; a pack and a step at least."""
    positions = max(1, round(epochs * num_packs))
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
        needs
            that: it takes a gradient over only in a step's last micro-step, and only of parameters that this one
            reaches.

        Raises: InputError for a set without packs.
        """
        if len(index) == 0:
            raise InputError("there are no packs to train on")
        assert packs_per_step >= 1 and world_size >= 1 and epochs > 0
        self._index, self._seed, self._cost = index, seed, cost
        self._packs_per_step, self._world_size, self._images_always = packs_per_step, world_size, images_always
        self.num_positions, self.num_steps = length_of(len(index), epochs, packs_per_step, max_steps)
        self.steps_per_epoch = len(index) / packs_per_step

    def balanced_by(self, cost: PackCost) -> Plan:
        """The same steps, assigned to ranks by another cost."""
        other = copy(self)
        other._cost = cost
        return other

    def packs_of(self, step: int) -> np.ndarray:
        """Pack numbers of a step, int64 [packs_per_step, or fewer in the last step], in the stream's order."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        first = step * self._packs_per_step
        positions = np.arange(first, min(first + self._packs_per_step, self.num_positions), dtype=np.int64)
        epochs = positions // len(self._index)
        parts = [
            permute(positions[epochs == epoch] % len(self._index), len(self._index), self._seed, epoch)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)

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
