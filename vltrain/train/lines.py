"""Logs of a line a step: appended to, and cut where a run goes on."""

from __future__ import annotations

import json
from pathlib import Path


def cut_lines(path: Path, first_step: int) -> None:
    """Drops the lines of `first_step` and later, and one that a crash cut short. The file is whole at any time."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] < first_step:
                    kept.append(line)
            except ValueError:
                break
    beside = path.with_suffix(".partial")
    beside.write_text("".join(line + "\n" for line in kept))
    beside.rename(path)
