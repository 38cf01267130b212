"""Processes of this machine: whether one lives, who started this one, and that this one ends with it.

A launcher that is killed cannot end its ranks: they would go on, hold GPUs and the run's folder, and wait for one
another. So each looks, every second, whether the launchers among its ancestors are still there.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from vltrain.errors import end_at_once

LAUNCHED_BY = "VLTRAIN_LAUNCHED_BY"
"""Variable by which a program of ours that starts others tells them who it is: pid and start."""
LAUNCHERS = {
    "deepspeed",
    "torchrun",
    "accelerate",
    "mpirun",
    "mpiexec",
    "mpiexec.hydra",
    "mpirun_rsh",
    "orterun",
    "prterun",
    "orted",
    "prted",
    "hydra_pmi_proxy",
    "slurmstepd",
}
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands")
POLL_SECONDS = 1.0
EXIT_LAUNCHER_DIED = 1


def stat_of(pid: int) -> tuple[str, str, int]:
    """A process's state, such as Z for one that has ended, when it started, in the kernel's ticks, and its parent;
    empty and 0 where that is not to be had."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "", "", 0


def is_alive(pid: int, start: str | None = None) -> bool:
    """Whether a process of this machine lives; with its `start` (see `stat_of`), that one and none that got its number
    later."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    state, started, _ = stat_of(pid)
    return state not in ("Z", "X") and (start is None or started in ("", start))


def launched_by_me() -> dict[str, str]:
    """The variable for a program that this process starts and that is to end with it."""
    return {LAUNCHED_BY: f"{os.getpid()} {stat_of(os.getpid())[1]}"}


def end_with_launchers() -> None:
    """Has this process end within seconds of those that launched it, as a rank or by `launched_by_me`. Without any does
    nothing."""
    watched = launchers()
    if watched:
        threading.Thread(target=_watch, args=(watched,), name="end with launchers", daemon=True).start()


def launchers() -> list[tuple[int, str, str]]:
    """(pid, start, name) of the launchers above this process, one above the other, and of who says so in
    LAUNCHED_BY."""
    found: list[tuple[int, str, str]] = []
    pid = os.getppid()
    while pid > 0 and (name := _launcher_name(pid)) is not None:
        _, start, parent = stat_of(pid)
        found.append((pid, start, name))
        pid = parent
    told, _, start = os.environ.get(LAUNCHED_BY, "").partition(" ")
    if told.isdecimal() and start:
        found.append((int(told), start, "vltrain"))
    return found


def _launcher_name(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:5]
    except OSError:
        return None
    names = [os.path.basename(word).split(":")[0] for word in words]
    return next((name for name in names if name in LAUNCHERS or name.startswith(LAUNCHER_MODULES)), None)


def _watch(watched: list[tuple[int, str, str]]) -> None:
    while True:
        for pid, start, name in watched:
            if not is_alive(pid, start):
                end_at_once(
                    f"its launcher ({name}, pid {pid}) has died; ended without saving, the same command goes on",
                    EXIT_LAUNCHER_DIED,
                )
        time.sleep(POLL_SECONDS)
