"""Starts groups of real processes on this machine, as a launcher would."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher would give the process of that rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": _python_path(),
    }


class Forked:
    """A process that `tests.support.warm` has forked, with what of `subprocess.Popen` is asked of one; see `start`."""

    def __init__(
        self,
        program: str,
        arguments: list[str],
        environment: dict[str, str],
        stdout: Path,
        stderr: Path | None,
        folder: Path,
    ) -> None:
        places = {"folder": str(folder), "stdout": str(stdout), "stderr": str(stderr) if stderr else None}
        self.pid: int = _ask_warm(program=program, arguments=arguments, environment=environment, **places)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask_warm(pid=self.pid)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


Process = Forked | subprocess.Popen


@functools.cache
def _warm() -> subprocess.Popen[str]:
    """This process's `tests.support.warm`, which ends with it. Ctrl-C is for this process alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
    command = [sys.executable, "-m", "tests.support.warm"]
    warm = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert warm.stdout is not None and json.loads(warm.stdout.readline()) == "ready"
    return warm


def _ask_warm(**order: Any) -> Any:
    warm = _warm()
    assert warm.stdin is not None and warm.stdout is not None
    warm.stdin.write(json.dumps(order) + "\n")
    warm.stdin.flush()
    return json.loads(warm.stdout.readline())


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def start(
    program: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path | None = None,
    *,
    folder: Path = ROOT,
    fresh: bool = False,
) -> Process:
    """`program WORDS` in a process that leads a session of its own.

    Args:
        program: a module's name, or a script: a path that ends with .py.
        stdout, stderr: files that get what it prints; `stderr` None: all to `stdout`.
        fresh: start Python anew instead of forking one that has imported all (`tests.support.warm`). With a
            GPU always: CUDA can't be forked.
    """
    if not fresh and not torch.cuda.is_available():
        return Forked(program, list(words), dict(environment), stdout, stderr, folder)
    with open(stdout, "wb") as out, open(stderr or stdout, "ab") as err:
        command = [sys.executable, *([program] if program.endswith(".py") else ["-m", program]), *words]
        return subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=out,
            stderr=err if stderr else subprocess.STDOUT,
            start_new_session=True,
        )


def start_ranks(
    module: str, arguments: list[str], world_size: int, output: Path, *, fresh: bool = False
) -> list[Process]:
    """Calls `main(*arguments)` of the module in a process per rank; what rank r prints goes to `output`.r.

    Args:
        fresh: see `start`.
    """
    port, words = free_port(), [module, *arguments]
    environments = [rank_environment(rank, world_size, port) for rank in range(world_size)]
    return [
        start("tests.support.rank", words, environments[rank], Path(f"{output}.{rank}"), fresh=fresh)
        for rank in range(world_size)
    ]


def on_ranks(
    program: str, *words: str, num_ranks: int = 2, timeout_seconds: float = 600
) -> list[subprocess.CompletedProcess[str]]:
    """`program WORDS`, a script such as launch/evaluate.py or a module, on each rank; what came of each. Where one
    fails the others are ended, as by a launcher."""
    port = free_port()
    with tempfile.TemporaryDirectory() as place:
        outputs = [(Path(place, f"out.{rank}"), Path(place, f"err.{rank}")) for rank in range(num_ranks)]
        ranks = [
            start(program, words, rank_environment(rank, num_ranks, port), *outputs[rank]) for rank in range(num_ranks)
        ]
        codes = wait_for_ranks(ranks, Path(place), timeout_seconds)
        return [
            subprocess.CompletedProcess([program, *words], code, *(file.read_text(errors="replace") for file in pair))
            for code, pair in zip(codes, outputs)
        ]


def vltrain(*words: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """`vltrain WORDS` in a process of its own: its exit code and what it printed.

    Args:
        folder: where it runs.
        variables: of its environment.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(), **variables}
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        code = start("vltrain", words, environment, out, err, folder=folder).wait(900)
        return subprocess.CompletedProcess(
            words, code, out.read_text(errors="replace"), err.read_text(errors="replace")
        )


def stop_ranks(processes: Sequence[Process], how: signal.Signals = signal.SIGKILL) -> None:
    """Ends our own processes and what they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, how)
    for process in processes:
        process.wait()


def wait_for_ranks(processes: Sequence[Process], output: Path, timeout_seconds: float = 600) -> list[int]:
    """Waits for all; when one fails or time runs out, the others are ended. Returns their exit codes."""
    deadline = time.monotonic() + timeout_seconds
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 5)  # the others may be about to say the same
        if time.monotonic() > deadline:
            stop_ranks(processes)
        time.sleep(0.05)
    return [process.wait() for process in processes]


def run_ranks(
    module: str,
    arguments: list[str],
    world_size: int,
    output: Path,
    timeout_seconds: float = 600,
    *,
    fresh: bool = False,
) -> None:
    """Runs a group to its end. Fails with the ranks' last words unless all end with 0. `fresh`: see `start_ranks`."""
    codes = wait_for_ranks(start_ranks(module, arguments, world_size, output, fresh=fresh), output, timeout_seconds)
    if any(codes):
        logs = "\n".join(
            f"--- rank {rank}\n{Path(f'{output}.{rank}').read_text(errors='replace')[-3000:]}"
            for rank in range(world_size)
        )
        raise AssertionError(f"{module} on {world_size} rank(s) ended with {codes}\n{logs}")


def deepspeed(*words: str, num_ranks: int = 2, timeout_seconds: float = 900) -> subprocess.CompletedProcess:
    """`deepspeed launch/...` as on the pages."""
    command, environment = deepspeed_command(*words, num_ranks=num_ranks)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_seconds)


def deepspeed_command(*words: str, num_ranks: int = 2) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of `deepspeed ...` on this machine."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(num_ranks), "--master_port", str(free_port()), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    return command, environment
