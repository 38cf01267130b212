"""What all parts share: their command line, what they find, and the JSON that they leave.

A part is a process of its own, `python -m tests.gpu.NAME --output FOLDER [--emulate]`, so that none inherits the
memory, the process group or the crash of another. It writes FOLDER/NAME.json as it goes: {"seconds", "machine",
"tables": {title: rows}, "failures": [text]}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measure import machine, show, tell


@dataclass
class Findings:
    """What a part has seen so far.

    emulate: on a CPU, with whatever stands in for a GPU, and in sizes that a CPU can do.
    folder: where the part may write.
    """

    emulate: bool
    folder: Path
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.emulate else "cuda")

    @property
    def result(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")  # a name may hold a dot

    def row(self, table: str, **values: Any) -> None:
        """A row of a table; rows of one table have equal keys."""
        self.tables.setdefault(table, []).append(values)
        tell(f"{table}: {values}")
        self.write()

    def check(self, table: str, found: float, limit: float, **what: Any) -> None:
        """A row that says what was compared, and a failure where `found` is above `limit` or NaN."""
        good = found <= limit
        self.row(table, **what, found=found, limit=limit, verdict="ok" if good else "FAILED")
        if not good:
            self.failures.append(f"{table}: {what}: found {found:.3g}, expected at most {limit:.3g}")

    def require(self, holds: bool, what: str) -> None:
        """A failure unless `holds`."""
        if not holds:
            self.failures.append(what)

    def write(self) -> None:
        """FOLDER.json: after each row, so that a part that is cut short leaves what it has found."""
        found = {
            "seconds": round(time.perf_counter() - self.started, 1),
            "emulated": self.emulate,
            "machine": machine(),
            "tables": self.tables,
            "failures": self.failures,
        }
        beside = self.folder.with_name(f"{self.folder.name}.json.partial")
        beside.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(beside, self.result)

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """What `call` returns; a failure and None where it raises: one thing that breaks must not hide the rest."""
        try:
            return call()
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            return None


def run_part(name: str, find: Callable[[Findings], None], documentation: str | None) -> int:
    """The `main` of a part. Returns 0, or 1 where something failed."""
    given = _parse(documentation)
    findings = _findings(name, given)
    findings.attempt(name, lambda: find(findings))
    return _close(findings)


def run_items(name: str, items: Sequence[str], find: Callable[[Findings, str], None], documentation: str | None) -> int:
    """As `run_part`, each item in a process of its own: DeepSpeed's engines never leave the memory of the one that made
    them."""
    given = _parse(documentation)
    if given.item is not None:
        findings = _findings(given.item, given)
        findings.attempt(given.item, lambda: find(findings, given.item))
        return _close(findings)
    findings = _findings(name, given)
    for item in items:
        words = ["--output", str(findings.folder), "--item", item, *(["--emulate"] if given.emulate else [])]
        code = subprocess.run([sys.executable, "-m", f"tests.gpu.{name}", *words]).returncode
        result = findings.folder / f"{item}.json"
        found = json.loads(result.read_text()) if result.exists() else {"tables": {}, "failures": []}
        for title, rows in found["tables"].items():
            findings.tables.setdefault(title, []).extend(rows)
        findings.failures += found["failures"] or ([f"{item}: ended with {code} before its end"] if code else [])
        findings.write()
    return _close(findings)


def _parse(documentation: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON")
    parser.add_argument("--emulate", action="store_true", help="on a CPU")
    parser.add_argument("--item", help="one of what the part does, for the process that does it")
    return parser.parse_args()


def _findings(name: str, given: argparse.Namespace) -> Findings:
    findings = Findings(emulate=given.emulate, folder=given.output / name)
    findings.folder.mkdir(parents=True, exist_ok=True)
    findings.result.unlink(missing_ok=True)
    return findings


def _close(findings: Findings) -> int:
    for title, rows in findings.tables.items():
        print(f"\n{title}")
        show(rows)
    for failure in findings.failures:
        print(f"FAILED {failure}")
    findings.write()
    return 1 if findings.failures else 0


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`, in float64; NaN where anything is NaN."""
    exact = exact.detach().double()
    return float((found.detach().to(exact.device).double() - exact).norm() / exact.norm().clamp(min=1e-30))
