"""Whether a stage of a run in stages is done: its last checkpoint is named in RUN/finished.json once it is trained and
evaluated."""

from __future__ import annotations

import enum
from pathlib import Path

from vltrain.errors import InputError
from vltrain.files.atomic import write_json
from vltrain.files.strict_json import read_json
from vltrain.receipts.manifest import LATEST, pointed, read_manifest
from vltrain.train.checkpoints.checkpoint import Checkpoint

FINISHED = "finished.json"


class Stage(enum.Enum):
    """What a run is in a run in stages: another follows, or none."""

    EARLIER = enum.auto()
    LAST = enum.auto()


def mark_finished(folder: Path) -> None:
    """Says that the run in the folder is done. Raises InputError where it cannot be written."""
    newest = pointed(folder / "checkpoints", LATEST)
    if newest is not None:
        manifest = read_manifest(newest)
        write_json(folder / FINISHED, {"step": manifest.step, "checkpoint": manifest.digest})


def is_finished(folder: Path, newest: Checkpoint) -> bool:
    """Whether the run in the folder is done, and `newest` is what it ended with."""
    try:
        found = read_json(folder / FINISHED)
    except InputError:  # not there, or cut short: the end is evaluated once more
        return False
    return isinstance(found, dict) and found.get("checkpoint") == newest.digest
