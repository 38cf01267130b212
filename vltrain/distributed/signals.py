"""Processes that we start and that must not hear what schedulers tell a run.

A scheduler signals every process of a job, a terminal every process of a command. The ranks answer
(`vltrain.distributed.preemption`); a process that decodes images for one has to go on until its rank has saved. So it
is born with these signals blocked: a mask is inherited from the first instruction on, where a handler of its own would
come seconds too late. Trade-off: such a process no longer ends on SIGTERM or Ctrl-C; it ends when its parent says so,
or has gone (`end_with_parent`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker

HEARD_BY_RANKS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def block_signals_in_workers() -> Iterator[None]:
    """Processes started inside the block by this thread never hear SIGTERM, SIGUSR1 or SIGINT. This one hears them, at
    the latest after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD_BY_RANKS)
    # Python starts it with the first process, and then unblocks SIGTERM, whatever it was before: so it has to be there
    # already.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD_BY_RANKS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Has this process, started by `multiprocessing`, end as soon as its parent has ended, however: also where it waits
    for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a main process has none"

    def watch() -> None:
        connection.wait([parent.sentinel])  # without bound: it lasts as long as the parent
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
