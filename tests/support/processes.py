"""Starts groups of real processes on this machine, as a launcher would."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher would give the process of that rank."""
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip


def start_ranks(module: str, arguments: list[str], world_size: int, output: Path) -> list[subprocess.Popen]:
    """Calls `main(*arguments)` of the module in a process per rank; stdout and stderr of rank r go to `output`.r"""
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, port)
        with open(f"{output}.{rank}", "wb") as log:
            command = [sys.executable, "-m", "tests.support.rank", module, *arguments]
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return processes


def stop_ranks(processes: list[subprocess.Popen], how: signal.Signals = signal.SIGKILL) -> None:
    """Ends our own processes and what they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, how)
    for process in processes:
        process.wait()


def wait_for_ranks(processes: list[subprocess.Popen], output: Path, timeout_seconds: float = 600) -> list[int]:
    """Waits for all; when one fails or time runs out, the others are ended. Returns their exit codes."""
    deadline = time.monotonic() + timeout_seconds
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed:
            time.sleep(1.0)  # the others may be about to say the same
        if failed or time.monotonic() > deadline:
            stop_ranks(processes)
        time.sleep(0.05)
    return [process.returncode for process in processes]


def run_ranks(module: str, arguments: list[str], world_size: int, output: Path, timeout_seconds: float = 600) -> None:
    """Runs a group to its end. Fails with the ranks' last words unless all end with 0."""
    codes = wait_for_ranks(start_ranks(module, arguments, world_size, output), output, timeout_seconds)
    if any(codes):
        logs = "\n".join(f"--- rank {rank}\n{Path(f'{output}.{rank}').read_text(errors='replace')[-3000:]}" for rank in range(world_size))
        raise AssertionError(f"{module} on {world_size} rank(s) ended with {codes}\n{logs}")


def deepspeed(*words: str, num_ranks: int = 2, timeout_seconds: float = 900) -> subprocess.CompletedProcess:
    """`deepspeed launch/...` as in the README."""
    command, environment = deepspeed_command(*words, num_ranks=num_ranks)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_seconds)


def deepspeed_command(*words: str, num_ranks: int = 2) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of `deepspeed ...` on this machine."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(num_ranks), "--master_port", str(free_port()), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    return command, environment
