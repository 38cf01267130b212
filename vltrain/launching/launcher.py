"""Starts a program of launch/ on several ranks of this machine, as a user would: `deepspeed launch/NAME.py ...`.

The child has a session of its own, so that one that is interrupted ends with all of its ranks and the caller goes on to
tell about it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from vltrain.errors import InputError, nearest
from vltrain.files.processes import launched_by_me
from vltrain.shipped import LAUNCH

GRACE_SECONDS = 30.0  # between asking a child to end and ending it
LAST_LINES = 200  # of a log, in which the reason of a failure is looked for


def find_program(name: str, where: str) -> Path:
    """launch/NAME.py. Raises InputError naming `where` the name stands, with the nearest program."""
    programs = {path.stem: path for path in LAUNCH.glob("*.py")}
    if name not in programs:
        raise InputError(f"{where}: found '{name}', expected a program of launch/, {nearest(name, programs)}")
    return programs[name]


def default_ranks() -> int:
    """One per accelerator; without one two on the CPU, if it has two cores."""
    return torch.cuda.device_count() or min(2, _cores())


def launch(program: Path, words: Sequence[str], ranks: int, log: Path) -> int:
    """Runs a program on `ranks` ranks to its end, its output appended to `log`. Returns its exit code.

    Raises: KeyboardInterrupt after the child and its ranks have ended, if that comes meanwhile.
    """
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_accelerators", str(ranks),
        "--master_port", str(free_port()), str(program), *words,
    ]  # fmt: skip
    with log.open("ab") as output:
        output.write(f"$ deepspeed --num_accelerators {ranks} {program} {' '.join(words)}\n".encode())
        output.flush()
        child = subprocess.Popen(
            command,
            env=rank_environment(ranks),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return (
                child.wait()
            )  # without bound: a row takes as long as it takes, and what hangs in it has bounds of its own
        except BaseException:
            _end(child)
            raise


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, a scheduler's wish that we end, raises KeyboardInterrupt inside the block, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reason_of_failure(log: Path) -> str:
    """The line of a program's log that tells why it failed: its last `error: `, else the last of an exception, else the
    last."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()][-LAST_LINES:]
    ours = [line for line in lines if line.startswith("error: ")]
    raised = [
        line for line in lines if ("Error: " in line or "Exception: " in line) and not line.startswith("Traceback")
    ]
    return (ours or raised or lines or ["it said nothing"])[-1]


def _end(child: subprocess.Popen) -> None:
    """Ends the child's whole session: asks, then insists."""
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while _signal_group(child.pid, 0):
        child.poll()
        if time.monotonic() > deadline:
            _signal_group(child.pid, signal.SIGKILL)
            break
        time.sleep(0.1)
    child.wait()


def _signal_group(group: int, number: int) -> bool:
    """Signals all processes of a group; 0 only asks. Returns whether there is one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment that ranks of this machine are started in."""
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, **launched_by_me()}
    if not torch.cuda.is_available():
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, _cores() // ranks))
        )  # more threads than cores make every rank wait
    # DeepSpeed builds its extensions with the environment's own ninja.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    return environment


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
