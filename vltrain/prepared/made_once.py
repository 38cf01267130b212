"""A result that several processes need and one makes: rank 0 of a run, or of another run over the same data.

The others wait for the folder to appear, and before the process group exists: waiting on files instead of on a
collective means that an hour of preparation cannot run into a communication time-out. Whoever makes it holds its lock
(`vltrain.files.lock`), and so gives signs of life to the ranks of other nodes, which no launcher may end when rank 0
fails.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from vltrain.errors import InputError
from vltrain.files.lock import lock_beside, one_writer, writer_of

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOOK_SECONDS = 10.0  # between two looks at the lock, which ask the file server
UNSEEN_SECONDS = 600.0  # that rank 0 may take to begin: it starts with the others
GONE_SECONDS = 120.0  # that a finished folder may take to be seen on another node
LONGEST_SECONDS = 48 * 3600.0  # for a result that another process makes, while it gives signs of life
TELL_SECONDS = 60.0


def made_once(
    make: Callable[[], object], result: Path, *, remedy: str, is_good: Callable[[], bool] | None = None
) -> None:
    """Has `make` make the folder `result`, unless another process is at it: then its result is waited for. Every rank
    calls this.

    Args:
        remedy: what a user can do but wait, see `vltrain.files.lock.one_writer`.
        is_good: whether what is there is the result; None: if anything is there.

    Raises:
        InputError: whoever makes it has gone without a result, or takes longer than LONGEST_SECONDS; what `make`
            raises.
    """
    is_good = is_good or result.exists
    if int(os.environ.get("RANK", "0")) > 0:
        _wait_for(result, is_good)
        return
    with one_writer(lock_beside(result), result, remedy=remedy, wait_seconds=LONGEST_SECONDS) as waited:
        if is_good():
            logger.info("data: %s is there meanwhile, and is used", result)
            return
        if waited:
            logger.warning("data: who was making %s has ended without a result; it is made here", result)
        make()


def _wait_for(result: Path, is_good: Callable[[], bool]) -> None:
    """For ranks other than 0."""
    began = seen = looked = told = time.monotonic()
    patience = UNSEEN_SECONDS
    while not is_good():
        now = time.monotonic()
        if now - looked >= LOOK_SECONDS or now - seen >= patience:
            looked = now
            writer = writer_of(lock_beside(result))
            if writer is not None:
                seen, patience = now, GONE_SECONDS
            if writer is not None and now - told >= TELL_SECONDS:
                told = now
                logger.warning("data: waiting for %s, which makes %s (%.0f s so far)", writer, result, now - began)
        if now - seen >= patience or now - began >= LONGEST_SECONDS:
            found = f"nobody has made it within {now - began:.0f} s"
            raise InputError(
                f"{result}: {found}: rank 0 has ended, or its folder is not this one; see rank 0's log, or "
                "prepare the data before the run"
            )
        time.sleep(POLL_SECONDS)
