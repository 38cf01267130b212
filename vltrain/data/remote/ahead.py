"""Fetching the next packs of a rank into the cache, in threads, while earlier ones are trained on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from vltrain.errors import InputError

THREADS = 16  # of a rank: each waits for one object at a time
MOST_PACKS = 64


class Ahead:
    """Keeps at most so many packs, and bytes of blocks, fetched that are not used yet.

    Args:
        packs: in the order in which they will be used.
        keep: fetches one; gives the bytes of its blocks. An InputError is left to whoever uses the pack, and meets it
            too.
        most_bytes: of blocks; one pack may be larger.
    """

    def __init__(self, packs: Iterator[int], keep: Callable[[int], int], most_bytes: int) -> None:
        self._packs, self._keep, self._most_bytes = packs, keep, most_bytes
        self._fetched: deque[list[int]] = deque()  # bytes of each pack that is not used yet
        self._owed = 0  # packs that were used before they were begun here
        self._closed = False
        self._changed = threading.Condition()
        for _ in range(THREADS):
            threading.Thread(target=self._work, name="fetch ahead", daemon=True).start()

    def used(self, number: int) -> None:
        """So many more packs have been used."""
        with self._changed:
            for _ in range(number):
                if self._fetched:
                    self._fetched.popleft()
                else:
                    self._owed += 1
            self._changed.notify_all()

    def close(self) -> None:
        """No more is begun."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_room())
                while self._owed and not self._closed:  # they need not be fetched any more
                    self._owed -= 1
                    next(self._packs, None)
                pack = None if self._closed else next(self._packs, None)
                if pack is None:
                    return
                num_bytes = [0]
                self._fetched.append(num_bytes)
            try:
                num_bytes[0] = self._keep(pack)
            except InputError:
                continue

    def _has_room(self) -> bool:
        return len(self._fetched) < MOST_PACKS and sum(one[0] for one in self._fetched) < self._most_bytes
