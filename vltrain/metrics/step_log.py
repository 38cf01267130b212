"""Logs of a line a step: appended to, and cut where a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

from vltrain.errors import InputError
from vltrain.files.atomic import write_whole


def truncate_jsonl(path: Path, first_step: int) -> None:
    """Drops the lines of `first_step` and later, and one that a crash cut short. The file is whole at any time.

    Raises: InputError if it cannot be read or written.
    """
    kept = []
    try:
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                if json.loads(line)["step"] < first_step:  # not read strictly: earlier versions wrote NaN as a loss
                    kept.append(line.decode() + "\n")
            except (ValueError, TypeError, KeyError, RecursionError):
                break
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), expected a line of JSON for each step; move it away, "
            "and a new one begins"
        ) from None
    write_whole(path, "".join(kept))


def plain_number(value: float) -> float | str:
    """A number as a line holds it: JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
