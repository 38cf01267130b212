"""The best checkpoint, and when it has been the best for too long: from the evaluations while training.

The figure is the headline of the evaluation's report (accuracy, CIDEr, ...), of which more is better. The checkpoint of
an evaluated step is saved before the evaluation, and holds the state from before it: a run that goes on from it
evaluates first, and so decides as it would have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vltrain.config.mixture import sets_of
from vltrain.config.older_runs import ADDED
from vltrain.config.schema import Config
from vltrain.errors import InputError
from vltrain.receipts.manifest import BEST, checkpoint_name, pointed
from vltrain.train.checkpoints.retention import point

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BestTracker:
    """What the evaluations so far say. Equal on all ranks.

    best: the largest figure, of `best_step`; stale: evaluations since then.
    measured_by: the settings that figures depend on.
    patience: so many without a larger figure end the training; None: none do.
    """

    patience: int | None = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    measured_by: dict[str, Any] = field(default_factory=dict)

    def update(self, step: int, metric: float) -> bool:
        """Takes an evaluation's metric. Returns whether it is the best so far (an equal one is not)."""
        if self.best is None or metric > self.best:
            self.best, self.best_step, self.stale = metric, step, 0
            return True
        self.stale += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `float.hex` keeps the figure exact."""
        best = None if self.best is None else float(self.best).hex()
        return {"best": best, "best_step": self.best_step, "stale": self.stale, "measured_by": self.measured_by}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's `state`; begins anew where figures were others, see `require_same_figures`."""
        if _since(state.get("measured_by", self.measured_by), self.measured_by) != self.measured_by:
            return
        self.best = None if state["best"] is None else float.fromhex(state["best"])
        self.best_step, self.stale = state["best_step"], state["stale"]


def measured_by(config: Config) -> dict[str, Any]:
    """The settings, by dotted name, without which two evaluations' figures cannot be compared."""
    evaluation = {
        f"eval.{name}": getattr(config.eval, name)
        for name in ("scorer", "method", "normalise_length", "max_samples", "spread")
    }
    sets = {
        f"data.mixture.{name}.{key}": value
        for name, one in sets_of(config).items()
        for key, value in (
            ("scorer", one.eval.scorer),
            ("eval_split", one.data.eval_split),
            *((("method", one.eval.method),) if one.eval.method != config.eval.method else ()),
        )
    }
    return {**evaluation, "data.eval_split": config.data.eval_split, **sets}


def evaluated_as(run_state: Mapping[str, Any]) -> dict[str, Any]:
    """The section `eval` of the evaluations until a checkpoint, as far as it says: for `as_begun`, by which a run goes
    on answering the same questions."""
    measured = run_state.get("selection", {}).get("measured_by", {})
    found = {key.removeprefix("eval."): value for key, value in measured.items() if key.startswith("eval.")}
    return {"eval": found} if found else {}


def _since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a version measured by that did not know some of today's settings."""
    return {**{key: ADDED[key] for key in now if key in ADDED}, **before}


def require_same_figures(state: dict[str, Any], config: Config, where: str) -> None:
    """Raises InputError if the best checkpoint, or the end of the training, would be chosen by figures of different
    kinds.

    Args:
        state: as `BestTracker.state` left it; {} of a checkpoint without.
        where: whose it is.
    """
    if state.get("best") is None or not (config.train.keep_best or config.train.early_stopping_patience is not None):
        return
    now = measured_by(config)
    before = _since(state.get("measured_by", {}), now)
    changed = "; ".join(
        f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]
    )
    if changed:
        message = (
            f"{where}: train.keep_best and train.early_stopping_patience compare evaluations, and these were made "
            f"otherwise until now: {changed}"
        )
        raise InputError(f"{message}. Restore this, or go on without both")


def name_best(root: Path, step: int) -> None:
    """Lets `best` name the checkpoint of a step. Raises InputError if that cannot be written."""
    name = checkpoint_name(step)
    if pointed(root, BEST) == root / name:
        return
    try:
        point(root, BEST, name)
    except OSError as error:
        raise InputError(
            f"{root / BEST}: cannot be written ({error.strerror}); free disk space and resume with --resume auto"
        ) from None
