"""The log of speed: one line of JSON for each thing measured at a commit, so that a figure can be found again.

Figures of two lines are not to be compared: machines differ, and one machine from hour to hour. What lasts is a line's
ratio to what took turns with it in its run; to hold two commits against each other, tests.benchmarks.compare.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import refuse, round_ratios

ROOT = Path(__file__).parents[2]
HISTORY = ROOT / "tests" / "benchmarks" / "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the log keeps. `least` and `most` are the spread over the runs; ratios are taken run by run, this over the
    reference; both are None where nothing took turns."""

    commit: str
    date: str
    machine: str
    cores: int
    threads: int
    load: float
    precision: str
    what: str
    unit: str
    runs: int
    median: float
    least: float
    most: float
    reference: str | None
    ratio: float | None
    ratio_least: float | None
    ratio_most: float | None
    quick: bool


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def line(
    *,
    commit: str,
    machine: Mapping[str, Any],
    precision: str,
    what: str,
    unit: str,
    values: Sequence[float],
    reference: str | None = None,
    beside: Sequence[float] | None = None,
    quick: bool = False,
) -> Line:
    """A line of now. machine: of `measure.machine`; values, beside: a figure a run, of the same rounds."""
    ratios = None if beside is None else round_ratios(values, beside)
    return Line(
        commit=commit,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine["device"],
        cores=machine["cores"],
        threads=machine["threads"],
        load=machine["load_average"][0],
        precision=precision,
        what=what,
        unit=unit,
        runs=len(values),
        **spread_of(values),
        reference=reference,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_least=min(ratios) if ratios else None,
        ratio_most=max(ratios) if ratios else None,
        quick=quick,
    )


def append(lines: Sequence[Line], path: Path) -> None:
    """Adds them at the file's end, all in one write."""
    with path.open("a") as log:
        log.write("".join(json.dumps(asdict(one)) + "\n" for one in lines))


def git(*words: str, root: Path = ROOT) -> str | None:
    """What git says there, without the last line's end; None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def changed_files(root: Path = ROOT) -> list[str]:
    """Tracked files that are not as the commit has them, the log itself aside."""
    names = (git("diff", "--name-only", "HEAD", root=root) or "").splitlines()
    return [name for name in names if name != str(HISTORY.relative_to(ROOT))]


def check_log(path: Path, quick: bool) -> None:
    """Refuses a log that lines cannot or should not go to: the project's own keeps no smoke tests."""
    if quick and path.resolve() == HISTORY:
        refuse("--log: figures of --quick are not worth keeping; name another file, as in --log /tmp/quick.jsonl")
    if not path.resolve().parent.is_dir():
        refuse(f"--log: the folder {path.resolve().parent} does not exist; make it first")


def measured_commit(path: Path, quick: bool, root: Path = ROOT) -> str:
    """The commit that is checked out, for lines in `path`. Refuses where a line of it would be a lie: no commit, or
    files that it has otherwise."""
    check_log(path, quick)
    commit = git("rev-parse", "HEAD", root=root)
    if commit is None:
        refuse(f"--log: {root} is not a git checkout with a commit (or git is missing), so a line could not name one")
    commit = commit[:12]
    if changed := changed_files(root):
        refuse(
            f"--log: {len(changed)} tracked files are not as commit {commit} has them ({changed[0]}, ...); commit them "
            "first, or measure without --log"
        )
    return commit
