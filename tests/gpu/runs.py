"""Runs of launch/train_mmt.py for the parts: started, killed, read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.processes import ROOT, free_port, rank_environment


def start(words: list[str], log: Path, program: str = "launch/train_mmt.py") -> subprocess.Popen:
    """One rank on the first device, in a session of its own."""
    environment = {**rank_environment(0, 1, free_port()), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as output:
        command = [sys.executable, program, *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def finish(words: list[str], log: Path, program: str = "launch/train_mmt.py", timeout_seconds: float = 500) -> float:
    """Runs to the end. Returns seconds; raises RuntimeError with the log's end where it fails."""
    began = time.perf_counter()
    child = start(words, log, program)
    try:
        code = child.wait(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        code = "a time-out"
    if code:
        raise RuntimeError(f"{' '.join(words[:6])} ended with {code}: {log.read_text(errors='replace')[-1500:]}")
    return time.perf_counter() - began


def kill_after(words: list[str], log: Path, run: Path, num_steps: int, timeout_seconds: float = 300) -> int:
    """kill -9 once log.jsonl has `num_steps` lines. Returns how many there were; raises RuntimeError where the run ended before."""
    child = start(words, log)
    lines, deadline = 0, time.monotonic() + timeout_seconds
    while child.poll() is None and time.monotonic() < deadline:
        lines = len(losses(run))
        if lines >= num_steps:
            break
        time.sleep(0.02)
    if child.poll() is not None:
        raise RuntimeError(f"it ended with {child.returncode} before it was killed: {log.read_text(errors='replace')[-1500:]}")
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return lines


def losses(run: Path) -> list[float]:
    """Of each step that log.jsonl holds whole."""
    log = run / "log.jsonl"
    if not log.exists():
        return []
    return [json.loads(line)["loss"] for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of the newest checkpoint, by file and name."""
    newest = max((run / "checkpoints").glob("step-*"))
    return {f"{file.name}/{name}": value for file in sorted(newest.glob("*.safetensors")) for name, value in load_file(file).items()}


def metrics(run: Path, split: str = "test") -> dict[str, Any]:
    return json.loads((run / "eval" / split / "metrics.json").read_text())
