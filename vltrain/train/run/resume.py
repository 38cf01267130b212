"""Which checkpoint a training run goes on from."""

from __future__ import annotations

from pathlib import Path

from vltrain.errors import InputError
from vltrain.receipts.manifest import checkpoints_in
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.receipts.verify import unsaved_steps
from vltrain.train.checkpoints.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint


def checkpoint_to_resume(folder: Path, resume: str) -> Checkpoint | None:
    """What to go on from: `auto` the newest whole checkpoint, if any; `never` none, and none may be there; else that
    folder.

    Raises:
        InputError: the named checkpoint is damaged, none can be used, or a run would be overwritten.
    """
    root = folder / "checkpoints"
    if resume == "never":
        if checkpoints_in(root):
            raise InputError(
                f"{folder}: holds the checkpoints of a run; resume with --resume auto, choose another --output, "
                "or remove the folder"
            )
    elif resume != "auto":
        return open_checkpoint(Path(resume))
    found = newest_checkpoint(root) if resume == "auto" else None
    if found is None:
        _require_no_lost_checkpoints(folder)
    return found


def _require_no_lost_checkpoints(folder: Path) -> None:
    """Raises InputError for a run's folder whose receipt says that there were checkpoints, before it is written
    anew."""
    if not (folder / RECEIPT).exists():
        return
    done = len(read_receipt(folder / RECEIPT).lines)
    if done > unsaved_steps(folder):
        raise InputError(
            f"{folder}: its receipt has {done} steps and there is no checkpoint: they were removed or moved. "
            "Put one back; or, to train anew, choose another "
            f"--output or remove {folder / RECEIPT}"
        )
