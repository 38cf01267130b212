"""The best checkpoint, and when it has been the best for too long: from the evaluations while training.

The figure is the headline of the evaluation's report (accuracy, CIDEr, ...), of which more is better. The checkpoint of an evaluated step
is saved before the evaluation, and holds the state from before it: a run that goes on from it evaluates first, and so decides as it would
have.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.check.manifest import BEST, checkpoint_name, pointed
from vltrain.errors import InputError
from vltrain.train.retention import point

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Selection:
    """What the evaluations so far say. Equal on all ranks.

    best: the largest figure, of `best_step`; stale: evaluations since then.
    patience: so many without a larger figure end the training; None: none do.
    """

    patience: int | None = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0

    def take(self, step: int, figure: float) -> bool:
        """Takes an evaluation's figure. Returns whether it is the best so far (an equal one is not)."""
        if self.best is None or figure > self.best:
            self.best, self.best_step, self.stale = figure, step, 0
            return True
        self.stale += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `float.hex` keeps the figure exact."""
        return {"best": None if self.best is None else float(self.best).hex(), "best_step": self.best_step, "stale": self.stale}

    def load(self, state: dict[str, Any]) -> None:
        self.best = None if state["best"] is None else float.fromhex(state["best"])
        self.best_step, self.stale = state["best_step"], state["stale"]


def name_best(root: Path, step: int) -> None:
    """Lets `best` name the checkpoint of a step. Raises InputError if that cannot be written."""
    name = checkpoint_name(step)
    if pointed(root, BEST) == root / name:
        return
    try:
        point(root, BEST, name)
    except OSError as error:
        raise InputError(f"{root / BEST}: cannot be written ({error.strerror}); free disk space and go on with --resume auto") from None
