"""Which samples share a pack: few wasted tokens, and packs that stay a fair mixture of the data.

Classic best-fit-decreasing fills well but sorts by length; length goes with the kind of question, so every pack would
hold one kind, which makes bad gradient steps. Here length decides only where it must:

1. Long samples, if any, are placed by best fit, longest first.
2. The others are placed in random order into the room that is left and into new packs, as many as come nearest to full.
3. Each pack that is not exactly full then swaps single samples against a random reserve until it is. Packs that do not
   get there are undone and their samples placed again, until too few come out full.
4. What remains goes by best fit.

Fewer than FEW samples leave no reserve worth swapping with, and best fit alone would sort them: they are scattered over
as many packs as best fit needs, longest first, each into a random pack with room for it, some times, and of those in
which everything has a place the most even is taken.

What counts as long is tried out on a part of the samples: nothing, if that fills the packs; everything (plain best
fit), where few samples go into a pack and only the right ones fit together. Swaps keep the number of images, so a bound
on images per pack holds throughout. All of it is O(n log n) and works on whole arrays or whole length classes.
Trade-off: up to FILL_FOR_MIXING of the room, and every notion of which samples would go well together.
"""

from __future__ import annotations

from bisect import bisect_right, insort

import numpy as np

LONG_SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8, 0.0)  # of the capacity, from best mixed to best filled (usually)
FILL_FOR_MIXING = 0.002  # of the packs' room that a better mixture may cost
TRIED_SAMPLES = 20_000
RESERVE = 1 / 8  # of the samples placed
SMALLEST_RESERVE = 16  # samples; with fewer there is too little to choose from
FEW = 128  # samples; with as many the reserve is the smallest one
FEW_TRIALS = 16
SWAP_ROUNDS = 6
MOST_UNDONE = 0.9  # of the samples placed; beyond, placing them again is not worth it
_NO_BOUND = np.iinfo(np.int64).max


def pack_lengths(
    lengths: np.ndarray, capacity: int, images: np.ndarray | None = None, max_images: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Deals samples to packs.

    Args:
        lengths: int [n], tokens of each sample, each in [1, capacity]. Over-long samples are the caller's to report.
        capacity: tokens that a pack holds.
        images: int [n], images of each sample, each at most `max_images`; needed only with `max_images`.
        max_images: images that a pack holds (an image that two samples share counts twice), or None.
        seed: the same arguments and seed give the same packs.

    Returns:
        order int64 [n], sample numbers, pack after pack; row_starts int64 [rows + 1]: pack r is
        order[row_starts[r]:row_starts[r + 1]].
    """
    lengths = np.asarray(lengths, np.int64)
    assert lengths.ndim == 1 and (len(lengths) == 0 or 1 <= lengths.min() <= lengths.max() <= capacity), (
        "lengths must be in [1, capacity]"
    )
    if max_images is None:
        images, max_images = np.zeros(len(lengths), np.int64), 0
    else:
        assert images is not None and len(images) == len(lengths)
        images = np.asarray(images, np.int64)
        assert len(images) == 0 or images.max() <= max_images, "a sample has more images than a pack may hold"
    if len(lengths) < FEW:
        return _scattered(lengths, capacity, images, max_images, seed)
    tried = np.random.default_rng(seed).permutation(len(lengths))[:TRIED_SAMPLES]
    trials = [
        _Packer(lengths[tried], capacity, images[tried], max_images, seed).place_all(share) for share in LONG_SHARES
    ]
    fewest = min(len(trial.room) for trial in trials)
    good = next(
        share
        for share, trial in zip(LONG_SHARES, trials, strict=True)
        if fewest >= (1 - FILL_FOR_MIXING) * len(trial.room)
    )
    return _Packer(lengths, capacity, images, max_images, seed).place_all(good).result()


def _scattered(
    lengths: np.ndarray, capacity: int, images: np.ndarray, max_images: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`pack_lengths` of a few samples."""
    best = _Packer(lengths, capacity, images, max_images, seed).place_all(0.0)
    if len(best.room) > 1:
        for share in LONG_SHARES[:-1]:
            trials = [_Packer(lengths, capacity, images, max_images, [seed, trial]) for trial in range(FEW_TRIALS)]
            placed = [packer for packer in trials if packer.scatter(share, len(best.room))]
            if placed:
                return min(placed, key=_Packer.unevenness).result()
    return best.result()


class _Packer:
    """Rows (packs) being filled: `row_of` [n] gives each sample's row, `room` and `image_room` what each row has
    left."""

    def __init__(
        self, lengths: np.ndarray, capacity: int, images: np.ndarray, max_images: int, seed: int | list[int]
    ) -> None:
        self.lengths, self.capacity, self.images, self.max_images = lengths, capacity, images, max_images
        self.rng = np.random.default_rng(seed)
        self.row_of = np.full(len(lengths), -1, np.int64)
        self.room = np.empty(0, np.int64)
        self.image_room = np.empty(0, np.int64)

    def place_all(self, long_share: float) -> _Packer:
        """Places every sample; those over `long_share` of the capacity by best fit."""
        is_long = self.lengths > self.capacity * long_share
        self._best_fit(np.flatnonzero(is_long))
        begun = self.rng.permutation(np.flatnonzero(self.room > 0))
        pending = self.rng.permutation(np.flatnonzero(~is_long))
        while len(pending) * RESERVE >= SMALLEST_RESERVE and self.lengths[pending].sum() > 2 * self.capacity:
            before = len(pending)
            pending, begun = self._place(pending, begun, largest_gap=0)
            if len(pending) > MOST_UNDONE * before:
                pending, begun = self._place(pending, begun, largest_gap=self.capacity)
                break
        self._best_fit(pending)
        return self

    def scatter(self, long_share: float, num_rows: int) -> bool:
        """Places every sample into one of so many rows: those over `long_share` of the capacity by best fit, the others
        at random, where there is more room the likelier. Returns whether there was room for all, and something for each
        row."""
        self._new_rows(num_rows)
        is_long = self.lengths > self.capacity * long_share
        self._best_fit(np.flatnonzero(is_long))
        if len(self.room) > num_rows:
            return False
        others = self.rng.permutation(np.flatnonzero(~is_long))
        for sample in others[np.argsort(-self.lengths[others], kind="stable")].tolist():
            fits = np.flatnonzero((self.room >= self.lengths[sample]) & (self.image_room >= self.images[sample]))
            if len(fits) == 0:
                return False
            row = self.rng.choice(fits, p=self.room[fits] / self.room[fits].sum())
            self.row_of[sample] = row
            self.room[row] -= self.lengths[sample]
            self.image_room[row] -= self.images[sample]
        return bool((np.bincount(self.row_of, minlength=num_rows) > 0).all())

    def unevenness(self) -> float:
        """How much rows differ in the mean length of their samples: length goes with the kind of question."""
        counts = np.bincount(self.row_of, minlength=len(self.room))
        return float(np.std((self.capacity - self.room) / counts))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """`order` and `row_starts` of `pack_lengths`."""
        # A row's samples in random order: nothing is to be learned from a place in the pack.
        shuffled = self.rng.permutation(len(self.lengths))
        order = shuffled[np.argsort(self.row_of[shuffled], kind="stable")]
        counts = np.bincount(self.row_of, minlength=len(self.room))
        assert (counts > 0).all() and (self.room >= 0).all() and (self.image_room >= 0).all()
        return order, np.concatenate([[0], np.cumsum(counts)])

    def _best_fit(self, samples: np.ndarray) -> None:
        """Best-fit-decreasing over length classes: each sample goes where it leaves the least room, longest first.

        All samples of one length and image count, and all rows of one remaining room, are handled at once: m = room //
        length samples into each row, which is what best fit does one by one.
        """
        samples = self.rng.permutation(samples)
        samples = samples[np.lexsort((-self.images[samples], -self.lengths[samples]))]
        kinds = np.stack([self.lengths[samples], self.images[samples]])
        bounds = np.flatnonzero(np.any(np.diff(kinds, prepend=-1, append=-1), axis=0)).tolist()
        rows = self.rng.permutation(np.flatnonzero(self.room > 0))
        open_rows = _OpenRows(self.room[rows], self.image_room[rows], rows)
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            self._place_class(samples[first:last], int(kinds[0, first]), int(kinds[1, first]), open_rows)

    def _place_class(self, samples: np.ndarray, length: int, num_images: int, open_rows: _OpenRows) -> None:
        """Places samples that are all of one length and image count."""
        placed, room = 0, length - 1
        image_room = _NO_BOUND
        while placed < len(samples):
            found = open_rows.next_kind(room, image_room, num_images)
            if found is None:
                per_row = _fitting(self.capacity, self.max_images, length, num_images)
                rows = self._new_rows(-(-(len(samples) - placed) // per_row))
                open_rows.add(self.capacity, self.max_images, rows)
                continue
            room, image_room = found
            per_row = _fitting(room, image_room, length, num_images)
            left = len(samples) - placed
            rows = open_rows.take(room, image_room, -(-left // per_row))
            counts = np.full(len(rows), per_row)
            counts[-1] = min(per_row, left - per_row * (len(rows) - 1))
            taken = samples[placed : placed + counts.sum()]
            self.row_of[taken] = np.repeat(rows, counts)
            self.room[rows] -= counts * length
            self.image_room[rows] -= counts * num_images
            open_rows.add(room - per_row * length, image_room - per_row * num_images, rows[:-1])
            open_rows.add(int(self.room[rows[-1]]), int(self.image_room[rows[-1]]), rows[-1:])
            placed += len(taken)

    def _new_rows(self, count: int) -> np.ndarray:
        first = len(self.room)
        self.room = np.concatenate([self.room, np.full(count, self.capacity)])
        self.image_room = np.concatenate([self.image_room, np.full(count, self.max_images)])
        return np.arange(first, first + count)

    def _place(self, pending: np.ndarray, begun: np.ndarray, largest_gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Deals samples in the given order to the rows `begun` and to new rows, then mends each row by swaps with a
        reserve.

        Rows left with a gap of at most `largest_gap` tokens are kept, the others are undone.

        Returns the samples that are not placed, in random order, and those of `begun` that were not kept.
        """
        num_reserve = int(len(pending) * RESERVE)
        reserve, drawn = pending[:num_reserve].copy(), pending[num_reserve:].copy()
        starts, ends = self._cut(drawn, begun)
        begun, waiting = begun[: len(starts)], begun[len(starts) :]
        rooms = np.concatenate([self.room[begun], np.full(len(starts) - len(begun), self.capacity)])
        sums = np.concatenate([[0], np.cumsum(self.lengths[drawn])])
        gaps = rooms - (sums[ends] - sums[starts])  # below zero: overfull
        unplaced = [reserve, drawn[ends[-1] if len(ends) else 0 :]]
        self._swap(drawn, starts, ends, gaps, reserve)
        while len(overfull := np.flatnonzero(gaps < 0)):
            ends[overfull] -= 1
            unplaced.append(drawn[ends[overfull]])
            gaps[overfull] += self.lengths[unplaced[-1]]
        self._swap(drawn, starts, ends, gaps, reserve)

        kept = (gaps <= largest_gap) & (ends > starts)
        unplaced.append(drawn[_ranges(starts[~kept], (ends - starts)[~kept])])
        rows = np.concatenate([begun[kept[: len(begun)]], self._new_rows(int(kept[len(begun) :].sum()))])
        placed = drawn[_ranges(starts[kept], (ends - starts)[kept])]
        self.row_of[placed] = np.repeat(rows, (ends - starts)[kept])
        self.room[rows] = gaps[kept]
        np.subtract.at(self.image_room, self.row_of[placed], self.images[placed])
        return self.rng.permutation(np.concatenate(unplaced)), np.concatenate([begun[~kept[: len(begun)]], waiting])

    def _cut(self, drawn: np.ndarray, begun: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts `drawn` into consecutive runs, one per row (those `begun` first), each as near to the row's room as can
        be.

        Returns starts and ends of the runs; a run may be empty, or over its row's room by less than half a sample.
        """
        sums = np.concatenate([[0], np.cumsum(self.lengths[drawn])]).tolist()
        image_sums = np.concatenate([[0], np.cumsum(self.images[drawn])]).tolist()
        rooms = zip(self.room[begun].tolist(), self.image_room[begun].tolist(), strict=True)
        bounds = [0]
        while True:
            start = bounds[-1]
            room, image_room = next(rooms, (self.capacity, self.max_images))
            full = sums[start] + room
            end = bisect_right(sums, full) - 1
            end_by_images = bisect_right(image_sums, image_sums[start] + image_room) - 1
            if end == len(drawn) <= end_by_images:  # the samples ran out: an unfilled row is not started
                return np.array(bounds[:-1], np.int64), np.array(bounds[1:], np.int64)
            if end < len(drawn) and sums[end + 1] - full < full - sums[end]:
                end += 1
            bounds.append(min(end, end_by_images))

    def _swap(
        self, drawn: np.ndarray, starts: np.ndarray, ends: np.ndarray, gaps: np.ndarray, reserve: np.ndarray
    ) -> None:
        """Swaps samples of rows whose gap is not zero for samples of the reserve that close it. Changes all but starts
        and ends in place.

        In a round each such row offers one random sample and wants one with as many images that is longer by the gap,
        or the longest below that. A swap is made if the gap gets smaller.
        """
        width = self.capacity + 1
        for _ in range(SWAP_ROUNDS):
            rows = np.flatnonzero((gaps != 0) & (ends > starts))
            if len(rows) == 0 or len(reserve) == 0:
                return
            reserve[:] = reserve[np.argsort(self.images[reserve] * width + self.lengths[reserve], kind="stable")]
            keys = self.images[reserve] * width + self.lengths[reserve]
            places = starts[rows] + (self.rng.random(len(rows)) * (ends[rows] - starts[rows])).astype(np.int64)
            wanted_lengths = np.clip(self.lengths[drawn[places]] + gaps[rows], 0, self.capacity)
            wanted = self.images[drawn[places]] * width + wanted_lengths
            by_wish = np.argsort(wanted, kind="stable")
            rows, places, wanted = rows[by_wish], places[by_wish], wanted[by_wish]
            rank = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)  # equal wishes take different samples
            slots, first = np.unique(np.searchsorted(keys, wanted, side="right") - 1 - rank, return_index=True)
            rows, places = rows[first][slots >= 0], places[first][slots >= 0]
            slots = slots[slots >= 0]
            given, gotten = drawn[places], reserve[slots]
            new_gaps = gaps[rows] - (self.lengths[gotten] - self.lengths[given])
            better = (self.images[given] == self.images[gotten]) & (np.abs(new_gaps) < np.abs(gaps[rows]))
            drawn[places[better]], reserve[slots[better]] = gotten[better], given[better]
            gaps[rows[better]] = new_gaps[better]


class _OpenRows:
    """Rows that can take more, by kind (room, image_room), kinds in ascending order."""

    def __init__(self, room: np.ndarray, image_room: np.ndarray, rows: np.ndarray) -> None:
        self._rows: dict[tuple[int, int], list[int]] = {}
        self._kinds: list[tuple[int, int]] = []
        by_kind = np.lexsort((image_room, room))
        bounds = np.flatnonzero(
            np.any(np.diff(np.stack([room[by_kind], image_room[by_kind]]), prepend=-1, append=-1), axis=0)
        )
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            self.add(int(room[by_kind[first]]), int(image_room[by_kind[first]]), rows[by_kind[first:last]])

    def next_kind(self, room: int, image_room: int, num_images: int) -> tuple[int, int] | None:
        """The first kind after (room, image_room) that has room for `num_images` images."""
        for number in range(bisect_right(self._kinds, (room, image_room)), len(self._kinds)):
            if self._kinds[number][1] >= num_images:
                return self._kinds[number]
        return None

    def take(self, room: int, image_room: int, count: int) -> np.ndarray:
        """Removes up to `count` rows of a kind."""
        rows = self._rows[room, image_room]
        taken = rows[-count:]
        del rows[-count:]
        if not rows:
            del self._rows[room, image_room]
            del self._kinds[bisect_right(self._kinds, (room, image_room)) - 1]
        return np.array(taken)

    def add(self, room: int, image_room: int, rows: np.ndarray) -> None:
        if len(rows) == 0 or room == 0:
            return
        if (room, image_room) not in self._rows:
            self._rows[room, image_room] = []
            insort(self._kinds, (room, image_room))
        self._rows[room, image_room].extend(rows.tolist())


def _fitting(room: int, image_room: int, length: int, num_images: int) -> int:
    """How many samples of that length and image count fit."""
    return min(room // length, image_room // num_images if num_images else _NO_BOUND)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + 1, ... counts[0] of them, starts[1], ...]."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return np.arange(int(offsets[-1])) + np.repeat(starts - offsets[:-1], counts)
