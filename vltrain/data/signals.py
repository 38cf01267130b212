"""Processes that we start and that must not hear what schedulers tell a run.

A scheduler signals every process of a job. The ranks answer (`vltrain.train.preemption`); a process that decodes images for one has to go on until its
rank has saved. So it is born with these signals blocked: a mask is inherited from the first instruction on, where a handler of its own
would come seconds too late. Given up: such a process no longer ends on SIGTERM; it ends when its rank says so, or has gone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

HEARD_BY_RANKS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started inside the block by this thread never hear SIGTERM or SIGUSR1. This one hears them, at the latest after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD_BY_RANKS)
    # Python starts it with the first process, and then unblocks SIGTERM, whatever it was before: so it has to be there already.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD_BY_RANKS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
