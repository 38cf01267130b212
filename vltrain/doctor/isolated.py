"""The kernels' cases in a process beside this one: a kernel that ends its process, hangs, or leaves the GPU's context
broken costs one line.

Where there is no GPU that process has TRITON_INTERPRET=1, so that Triton and the fused adapter kernel run there all the
same.

    python -m vltrain.doctor.isolated FILE CASE ...     (the child: appends to FILE, a line of JSON for each case begun
                                                        and each finding)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vltrain.doctor.findings import PROBLEM, Finding, one_line
from vltrain.doctor.kernels import CASES, examine
from vltrain.files.processes import end_with_launchers, launched_by_me
from vltrain.files.strict_json import read_lines

START_SECONDS = 60.0  # to import torch and the libraries, which may lie on a slow file system
CASE_SECONDS = 45.0  # a first compilation included
ROOT = Path(__file__).resolve().parents[2]


def examine_kernels(names: Sequence[str], threads: int, case_seconds: float = CASE_SECONDS) -> list[Finding]:
    """The findings of the cases `names` of `vltrain.doctor.kernels`, in their order.

    Args:
        threads: CPU threads that the process may use.
    """
    findings: list[Finding] = []
    left = list(names)
    with tempfile.TemporaryDirectory() as folder:
        while left:
            found, reason, begun = _run_child(left, Path(folder) / f"{len(left)}", threads, case_seconds)
            findings += found
            left = left[len(found) :]
            if reason is not None and not begun:
                return [*findings, Finding(status=PROBLEM, what="kernels", found=f"could not be tried: {reason}")]
            if reason is not None and left:
                case = CASES[left.pop(0)]
                findings.append(
                    Finding(status=PROBLEM, what=case.what, found=reason, do=f"needed only for {case.used_for}")
                )
    return findings


def _run_child(
    names: Sequence[str], report: Path, threads: int, case_seconds: float
) -> tuple[list[Finding], str | None, bool]:
    """What a process found before it ended, why it ended early if it did, and whether it got as far as to begin a
    case."""
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **launched_by_me()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    report.touch()
    errors = report.with_suffix(".stderr")
    with errors.open("wb") as stderr:
        command = [sys.executable, "-m", __name__, str(report), *names]
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
        try:
            ended = _wait(child, report, case_seconds)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    entries = [entry for _, entry in read_lines(report)]
    found = [Finding(**entry) for entry in entries if entry]
    begun = {} in entries
    if not ended:
        return found, "did not end in time, and was stopped", begun
    if child.returncode == 0:
        return found, None, begun
    how = (
        f"killed by {signal.Signals(-child.returncode).name}"
        if child.returncode < 0
        else f"ended with exit code {child.returncode}"
    )
    words = [line.strip() for line in errors.read_text(errors="replace").split("\n") if line.strip()]
    return found, f"its process was {how}" + (f": {words[-1][:300]}" if words else ""), begun


def _wait(child: subprocess.Popen, report: Path, case_seconds: float) -> bool:
    """Waits while the child reports in time. Returns whether it has ended by itself."""
    size, deadline = 0, time.monotonic() + START_SECONDS
    while child.poll() is None:
        if report.stat().st_size > size:
            size, deadline = report.stat().st_size, time.monotonic() + case_seconds
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def main(argv: Sequence[str]) -> int:
    """The child."""
    end_with_launchers()
    report, *names = argv
    with open(report, "a") as file:

        def write(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        for name in names:
            write({})  # begun: its time runs from here
            try:
                finding = examine(CASES[name])
            except Exception as error:
                finding = Finding(
                    status=PROBLEM,
                    what=CASES[name].what,
                    found=one_line(error),
                    do=f"needed only for {CASES[name].used_for}",
                )
                write(asdict(finding))
                if "CUDA" in str(error):
                    return 0  # its context may be broken: the rest gets a new process
                continue
            write(asdict(finding))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
