"""Logs of a line a step: appended to, and cut where a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path


def cut_lines(path: Path, first_step: int) -> None:
    """Drops the lines of `first_step` and later, and one that a crash cut short. The file is whole at any time."""
    kept = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                if json.loads(line)["step"] < first_step:  # not read strictly: earlier versions wrote NaN as a loss
                    kept.append(line + b"\n")
            except (ValueError, TypeError, KeyError):
                break
    beside = path.with_suffix(".partial")
    beside.write_bytes(b"".join(kept))
    beside.rename(path)


def plain_number(value: float) -> float | str:
    """A number as a line holds it: JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
