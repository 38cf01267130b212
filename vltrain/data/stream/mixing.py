"""Sets of packs mixed into one endless stream: position -> (set, position in that set's own stream), without storage.

Of two sets with shares a and b of WHOLE the first stands at position p where round((p + 1) a / WHOLE) is one more than
round(p a / WHOLE), and that is its own position. Of more sets the two smallest shares are mixed so, their mixture
with the next, and so on (Huffman's tree): all in whole numbers, exact at any position. Of two sets every stretch of any
length holds less than one pack more or fewer than its share; of more, each join adds its own rounding:
`launch/MIXTURES.md` has what was measured.

Position q of a set's own stream is pack permute(q mod n) of its pass q // n: a set that ends begins its next pass, in
another order, while the others go on. Trade-off: shares are of packs. Those of tokens and samples are turned into them
by a set's mean pack, so they hold in the mean and not in each step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np

from vltrain.data.stream.permutation import GOLDEN, permute

WHOLE = 10**9
"""What the shares add up to. Twice a position times a share must stay below 2^63: four billion packs."""
_Tree: TypeAlias = "int | tuple[_Tree, _Tree, int, int]"
"""A set's number; or (one part, the other, the first one's share, that of both)."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How sets are mixed. names: of the sets, in the order of their packs; num_packs: of each; shares: of each in the
    packs trained on, whole numbers that add up to WHOLE; passes: of each in an epoch, where that is what the recipe
    says, else an epoch is as many packs as all sets have; stops: the run ends with the first set that has had
    `train.epochs` passes."""

    names: tuple[str, ...]
    num_packs: tuple[int, ...]
    shares: tuple[int, ...]
    passes: tuple[float, ...] | None = None
    stops: bool = False

    @classmethod
    def alone(cls, num_packs: int) -> Mixing:
        """One set."""
        return cls(names=("",), num_packs=(num_packs,), shares=(WHOLE,))

    @cached_property
    def epoch(self) -> float:
        """Packs of an epoch."""
        if self.stops:
            return min(packs * WHOLE / share for packs, share in zip(self.num_packs, self.shares, strict=True))
        if self.passes is not None:
            return sum(packs * passes for packs, passes in zip(self.num_packs, self.passes, strict=True))
        return float(sum(self.num_packs))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each set's packs begin among all."""
        return starts_of(self.num_packs)

    def positions(self, epochs: float) -> int:
        """Length of a run's stream, one position a time that a pack is trained on; one at least."""
        if not self.stops:
            return max(1, round(epochs * self.epoch))
        most = [max(1, round(epochs * packs)) for packs in self.num_packs]
        beyond = [(one + len(most)) * WHOLE // share for one, share in zip(most, self.shares, strict=True)]
        low, high = 0, min(beyond) + 1
        while low < high:  # the longest stretch in which no set has more than its passes
            middle = (low + high + 1) // 2
            if all(count <= bound for count, bound in zip(self.counts(middle), most, strict=True)):
                low = middle
            else:
                high = middle - 1
        return max(1, low)

    def counts(self, position: int) -> list[int]:
        """Packs of each set among the first `position` of the stream."""
        counts = [0] * len(self.names)
        left = [(self._tree, position)]
        while left:
            node, length = left.pop()
            if isinstance(node, int):
                counts[node] = length
            else:
                one, other, share, both = node
                first = (2 * length * share + both) // (2 * both)
                left += [(one, first), (other, length - first)]
        return counts

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the set, the position in its own stream) at each of `positions`: int64 [m] each."""
        sets, own = np.zeros(len(positions), np.int64), np.asarray(positions, np.int64)
        if len(self.names) == 1:
            return sets, own
        own = own.copy()
        left: list[tuple[_Tree, np.ndarray]] = [(self._tree, np.arange(len(own)))]
        while left:
            node, places = left.pop()
            if isinstance(node, int):
                sets[places] = node
                continue
            one, other, share, both = node
            before = (2 * own[places] * share + both) // (2 * both)
            is_one = (2 * (own[places] + 1) * share + both) // (2 * both) > before
            own[places] = np.where(is_one, before, own[places] - before)
            left += [(one, places[is_one]), (other, places[~is_one])]
        return sets, own

    def packs(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Pack numbers among all sets' at each of `positions`, int64 [m]; the first set's alone are those that it would
        have by itself."""
        sets, own = self.split(positions)
        packs = np.empty(len(own), np.int64)
        for number, size in enumerate(self.num_packs):
            places = np.flatnonzero(sets == number)
            own_seed = seed + number * int(GOLDEN)
            passes, inside = np.divmod(own[places], size)
            for one in np.unique(passes).tolist():
                now = passes == one
                packs[places[now]] = self.starts[number] + permute(inside[now], size, own_seed, one)
        return packs

    def set_of(self, packs: np.ndarray) -> np.ndarray:
        """The number of the set that each pack is of, int64 [m]."""
        return np.searchsorted(self.starts, packs, side="right") - 1

    @cached_property
    def _tree(self) -> _Tree:
        heap: list[tuple[int, int, _Tree]] = [(share, number, number) for number, share in enumerate(self.shares)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (small, _, one), (large, order, other) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, order, (one, other, small, small + large)))
        return heap[0][2]

    def to_json(self) -> dict[str, Any]:
        """Without what the packs themselves say."""
        passes = {} if self.passes is None else {"passes": list(self.passes)}
        return {"shares": dict(zip(self.names, self.shares, strict=True)), **passes, "stops": self.stops}


def starts_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each of several ranges begins that lie one behind the other."""
    return (0, *accumulate(sizes[:-1]))


def shares_of(weights: Sequence[float], per_pack: Sequence[float]) -> tuple[int, ...]:
    """Shares in packs of sets that are to have shares by `weights` of something of which a pack of theirs holds
    `per_pack` in the mean: whole numbers that add up to WHOLE, by the largest remainders."""
    wanted = [weight / held for weight, held in zip(weights, per_pack, strict=True)]
    exact = [one / sum(wanted) * WHOLE for one in wanted]
    shares = [max(1, math.floor(one)) for one in exact]
    by_rest = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for place in range(abs(WHOLE - sum(shares))):
        number = by_rest[place % len(by_rest)] if sum(shares) < WHOLE else shares.index(max(shares))
        shares[number] += 1 if sum(shares) < WHOLE else -1
    return tuple(shares)
