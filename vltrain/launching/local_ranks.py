"""`--ranks N` of `vltrain train`, `evaluate`, `doctor` and `check recipe`: the same command on several ranks of this
machine, without a launcher of anybody's.

Each rank is a process `python -m vltrain COMMAND ...` with the environment that `deepspeed` or `torchrun` would give
it. Signals that reach this process go to all ranks, which save and leave as they do under a launcher; when one fails,
the others, which may wait for it, are ended after a while. The exit code is that of the first rank that failed, or 0.

Trade-off: one machine only; `deepspeed --hostfile`, torchrun and srun are for several.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from vltrain.config.command_line import COMMAND_LINE, FLAGS, QUIET, REBUILD, split_arguments
from vltrain.errors import InputError
from vltrain.launching.launcher import default_ranks, free_port, rank_environment

COMMANDS = ("train", "evaluate", "doctor", "check")
CHECK = "recipe"  # the one of `vltrain check` that runs on ranks
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE_SECONDS = 30.0  # after the first rank has failed
POLL_SECONDS = 0.2


def asked_ranks(command: str, words: Sequence[str]) -> int | None:
    """How many ranks the command line asks for: a number, or `auto` for one per accelerator, else two on the CPU; None
    where it does not say.

    Raises: InputError for anything else, for a command that takes none, and inside a rank that a launcher started.
    """
    if command == "check" and words[:1] != [CHECK]:
        return None
    if command not in COMMANDS or not any(word == "--ranks" or word.startswith("--ranks=") for word in words):
        return None
    arguments = split_arguments(list(words), flags=(*FLAGS, REBUILD, QUIET))
    text = arguments.last("ranks")
    if text is None or ("help", None) in arguments.options or ("print_config", None) in arguments.options:
        return None
    if text == "auto":
        return default_ranks()
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 4096):
        raise InputError(f"{COMMAND_LINE}: --ranks: found {text!r}, expected a number of 1 or more, or auto")
    if "RANK" in os.environ:
        raise InputError(
            f"{COMMAND_LINE}: --ranks: found {text}, but this process is rank {os.environ['RANK']} of a "
            "launcher already; leave it out"
        )
    return int(text)


def run_on_ranks(command: str, words: Sequence[str], ranks: int) -> int:
    """Runs `vltrain COMMAND WORDS` without its --ranks on so many ranks to the end. Returns the exit code, see the
    module."""
    shared = {
        **rank_environment(ranks),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    line = [sys.executable, "-u", "-m", "vltrain", command, *_without_ranks(words)]
    children: list[subprocess.Popen] = []
    with _forwarding(children):
        for rank in range(ranks):
            # A session of its own: Ctrl-C comes once, from here.
            children.append(
                subprocess.Popen(
                    line, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True
                )
            )
        return _wait(children)


def _without_ranks(words: Sequence[str]) -> list[str]:
    kept, left = [], iter(words)
    for word in left:
        if word == "--ranks":
            next(left, None)
        elif not word.startswith("--ranks="):
            kept.append(word)
    return kept


@contextmanager
def _forwarding(children: list[subprocess.Popen]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def _wait(children: list[subprocess.Popen]) -> int:
    """Until all have ended. Without bound as long as none has failed: a run takes as long as it takes, and what hangs
    in it has bounds of its own."""
    first, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        failed = next((code for child in children if (code := child.poll())), 0)
        if failed and not first:
            first, deadline = failed, time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    code = first or next((child.returncode for child in children if child.returncode), 0)
    return 128 - code if code < 0 else code
