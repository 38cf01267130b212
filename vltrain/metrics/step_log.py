"""Logs of a line a step: appended to, and cut where a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.atomic import write_whole
from vltrain.files.strict_json import require_plain_file

LOG = "log.jsonl"  # of a run: loss, gradient norm and learning rate of each step


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


def read_step_log(path: Path) -> dict[int, dict[str, float]]:
    """What a run's log says of each step, the step left out. A last line without its end, as of a run that is writing
    it, is not read.

    Raises: InputError if there is none, or a line is none of a step.
    """
    require_plain_file(path, "the log of a run's steps")
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a line of JSON for each step") from None
    steps: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            found: dict[str, Any] = json.loads(line)  # not strictly: earlier versions wrote NaN as a loss
            steps[int(found.pop("step"))] = {name: float(value) for name, value in found.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: not a step ({type(error).__name__}: {error}), expected step, loss, grad_norm and "
                "lr; the file was changed or damaged"
            ) from None
    return steps


def plain_number(value: float) -> float | str:
    """A number as a line holds it: JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
