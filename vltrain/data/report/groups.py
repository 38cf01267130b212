"""Things that belong together because something joins them, directly or through others."""

from __future__ import annotations

from array import array


class Groups:
    """Disjoint sets of the numbers below `size` (union-find with path halving), each known by its smallest."""

    def __init__(self, size: int = 0) -> None:
        self._parents = array("q", range(size))

    def grow(self, size: int) -> None:
        """Adds sets of one, up to that many numbers."""
        self._parents.extend(range(len(self._parents), size))

    def root(self, one: int) -> int:
        """The smallest number of its group."""
        parents = self._parents
        while parents[one] != one:
            parents[one] = parents[parents[one]]
            one = parents[one]
        return one

    def join(self, one: int, other: int) -> None:
        """Makes one group of two."""
        one, other = self.root(one), self.root(other)
        self._parents[max(one, other)] = min(one, other)
