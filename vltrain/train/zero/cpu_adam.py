"""DeepSpeed's AdamW for offloaded optimizer states, which is compiled at its first use.

torch marks an extension that is being compiled with a file named lock, and whoever finds it waits without a word and
without end: a run that was killed while it compiled would stop all later ones. A lock that nobody holds is taken away
here before the extension is asked for.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from vltrain.errors import InputError

logger = logging.getLogger(__name__)

UNTOUCHED_SECONDS = 600.0
"""After which a lock that no process of this machine holds is nobody's. Another machine may compile into the same home:
the compiler is done well within that."""
TOLD_AFTER_SECONDS = 5.0


def offloaded_adam(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """DeepSpeed's CPUAdam over parameter groups, as AdamW.

    Raises:
        InputError: it cannot be compiled.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from torch.utils.cpp_extension import _get_build_directory

    try:
        wait_for_builder(Path(_get_build_directory("cpu_adam", False)))
        return DeepSpeedCPUAdam(groups, betas=betas, eps=eps, adamw_mode=True)
    except Exception as error:  # the C++ extension is compiled here: any of a tool chain's failures may surface
        raise InputError(
            f"optimizer offload needs DeepSpeed's CPUAdam, which could not be built ({error}); it wants C++ and ninja"
        ) from error


def wait_for_builder(folder: Path, untouched_seconds: float = UNTOUCHED_SECONDS) -> None:
    """Returns once nobody compiles into a folder of torch's extensions: at the end of who does, or, where the lock was
    left behind, after taking it away. Waits of some seconds are logged with the lock's path."""
    lock, started, told = folder / "lock", time.monotonic(), False
    while lock.exists() and not _taken_away(folder, untouched_seconds):
        if not told and time.monotonic() - started > TOLD_AFTER_SECONDS:
            told = True
            logger.warning(
                "waiting for %s: another process compiles, or was killed while it did; in that case the file goes "
                "%.0f seconds after the last file was written there",
                lock,
                untouched_seconds,
            )
        time.sleep(0.1)


def _taken_away(folder: Path, untouched_seconds: float) -> bool:
    """Takes a lock away that nobody holds. One process at a time looks and does: the lock that another makes right
    after is another file, and held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        lock = folder / "lock"
        try:
            idle = time.time() - max(entry.stat().st_mtime for entry in folder.iterdir())
            if idle < untouched_seconds or _is_open_here(lock):
                return False
            lock.unlink()
        except (FileNotFoundError, ValueError):  # who held it has just finished
            return False
    finally:
        os.close(handle)
    logger.warning("%s: taken away, since nobody holds it and nothing was written there for %.0f seconds", lock, idle)
    return True


def _is_open_here(path: Path) -> bool:
    """Whether a process of this machine that we may look at has the file open, as torch keeps its lock."""
    wanted = os.path.realpath(path)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return True
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return False
