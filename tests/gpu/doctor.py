"""`vltrain doctor` on this machine: each of its lines, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.gpu.part import Findings, run_part
from tests.support.processes import ROOT, free_port, rank_environment


def find(findings: Findings) -> None:
    report = findings.folder / "doctor.json"
    command = [sys.executable, "launch/doctor.py", str(findings.folder), "--json", str(report)]
    child = subprocess.run(
        command, cwd=ROOT, env=rank_environment(0, 1, free_port()), capture_output=True, text=True, timeout=120
    )
    findings.require(
        child.returncode in (0, 1) and report.exists(),
        f"it ended with {child.returncode}: {(child.stderr or child.stdout)[-500:]}",
    )
    for line in json.loads(report.read_text())["findings"]:
        findings.row("vltrain doctor", status=line["status"], what=line["what"], found=line["found"])
        findings.require(line["status"] != "problem", f"{line['what']}: {line['found']}")


if __name__ == "__main__":
    sys.exit(run_part("doctor", find, __doc__))
