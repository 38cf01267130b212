"""How much may be inside the server at once: requests, and bytes of their bodies. Both are counted before a byte of a
body is read.

One event loop's; not for threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from vltrain.serve.errors import busy

WHOLE_BODIES = 16  # that are in memory at once, where each is as large as it may be; others wait to be read


class Lobby:
    """Requests from their first byte to the end of their answer.

    Args:
        max_waiting: beside the one that is answered; one more is refused.
        max_request_bytes: of one body.
    """

    def __init__(self, max_waiting: int, max_request_bytes: int) -> None:
        self._max_inside, self.max_request_bytes = max_waiting + 1, max_request_bytes
        self._free_bytes = WHOLE_BODIES * max_request_bytes
        self._freed = asyncio.Condition()
        self._leaving: set[asyncio.Task[None]] = set()
        self.inside = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A place inside, for the block. Raises ApiError, 429, where there is none."""
        if self.inside >= self._max_inside:
            raise busy(
                f"{self.inside} requests are here already, as many as may be (--max-waiting "
                f"{self._max_inside - 1}); try again later"
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def reserve(self, num_bytes: int) -> Reserved:
        """Room for a body of so many bytes; waits for it."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        return Reserved(self, num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self._free_bytes += num_bytes

        async def tell() -> None:
            async with self._freed:
                self._freed.notify_all()

        # Also where the request's own task is being cancelled, and may not wait.
        task = asyncio.get_running_loop().create_task(tell())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


class Reserved:
    """Bytes that a request holds in memory."""

    def __init__(self, lobby: Lobby, num_bytes: int) -> None:
        self._lobby, self._num_bytes = lobby, num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Keeps at most so many of them."""
        if num_bytes < self._num_bytes:
            given, self._num_bytes = self._num_bytes - num_bytes, num_bytes
            self._lobby._give_back(given)
