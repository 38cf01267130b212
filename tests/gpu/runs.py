"""Runs of launch/train_mmt.py for the parts: started, killed, read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.gpu.part import Findings
from tests.support.processes import ROOT, free_port, rank_environment

STEPS, SHORT_STEPS = 100, 20


def start(words: list[str], log: Path, program: str = "launch/train_mmt.py") -> subprocess.Popen:
    """One rank on the first device, in a session of its own."""
    environment = {**rank_environment(0, 1, free_port()), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as output:
        command = [sys.executable, program, *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


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


def vltrain(words: list[str], log: Path, *, on_cpu: bool = False, timeout_seconds: float = 500) -> tuple[float, str]:
    """Runs `vltrain WORDS` to its end, without a launcher. Returns seconds and stdout; raises RuntimeError with the end
    of what it says where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    began = time.perf_counter()
    command = [sys.executable, "-m", "vltrain", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_seconds
    )
    with log.open("a") as file:
        file.write(f"$ vltrain {' '.join(words)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise RuntimeError(f"vltrain {' '.join(words)} ended with {done.returncode}: {done.stderr[-1500:]}")
    return time.perf_counter() - began, done.stdout


def tuned_run(findings: Findings) -> Path:
    """A copy, for this part alone, of the run that the part `quickstart` left; where that was not run, a short one of
    the same recipe is trained."""
    beside, own = findings.folder.parent, findings.folder / "run"
    source = beside / "quickstart" / "run"
    if not (source / "eval" / "test" / "metrics.json").exists():
        source = findings.folder / "trained"
        words = [
            "--ds",
            "ds_configs/zero2.json",
            "--output",
            str(source),
            "--data.root",
            str(beside / "easyvqa"),
            "--eval.max_samples",
            "64",
        ]
        finish(
            [*words, "--train.max_steps", str(SHORT_STEPS if findings.emulate else STEPS)],
            findings.folder / "train.log",
        )
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(source, own)
    return own


def predictions(run: Path, split: str = "test") -> list[str]:
    return [
        json.loads(line)["prediction"] for line in (run / "eval" / split / "predictions.jsonl").read_text().splitlines()
    ]


def kill_after(words: list[str], log: Path, run: Path, num_steps: int, timeout_seconds: float = 300) -> int:
    """kill -9 once log.jsonl has `num_steps` lines. Returns how many there were; raises RuntimeError where the run
    ended before."""
    child = start(words, log)
    lines, deadline = 0, time.monotonic() + timeout_seconds
    while child.poll() is None and time.monotonic() < deadline:
        lines = len(losses(run))
        if lines >= num_steps:
            break
        time.sleep(0.02)
    if child.poll() is not None:
        raise RuntimeError(
            f"it ended with {child.returncode} before it was killed: {log.read_text(errors='replace')[-1500:]}"
        )
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
    return {
        f"{file.name}/{name}": value
        for file in sorted(newest.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def metrics(run: Path, split: str = "test") -> dict[str, Any]:
    return json.loads((run / "eval" / split / "metrics.json").read_text())
