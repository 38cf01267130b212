"""Saving while training goes on: the state is copied to host memory, and a thread writes the copy.

The step waits for the copy only. What is written appears under its name when it is whole, as ever; a failure is raised
where the run next looks: at the next step, before the next save, or at the end. The price is host memory for the whole
trainable state (12 bytes a weight) on rank 0, and that a run which dies meanwhile goes on from the checkpoint before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundTask:
    """At most one task at a time, in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], object]) -> None:
        """Starts a task, after the one before has ended. Raises what that one raised."""
        self.wait()

        def run() -> None:
            try:
                task()
            except BaseException as error:  # handed to the thread that trains
                self._error = error

        # Not a daemon: the interpreter does not end while it writes.
        self._thread = threading.Thread(target=run, name="save")
        self._thread.start()

    def check(self) -> None:
        """Raises what a task that has ended raised; waits for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the task under way, if any, and raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
