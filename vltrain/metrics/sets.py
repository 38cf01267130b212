"""What a run has seen of each set of a mixture: of a step its samples, tokens and mean loss, and sums since the start.

All but the losses follow from the plan, so a run that goes on counts on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vltrain.data.flat.index import Index
from vltrain.data.plan import Plan

_AT_ONCE = 4096  # steps of an earlier life that are counted together


@dataclass(frozen=True, kw_only=True)
class SetStep:
    """Of one set in one step. loss: the mean over its samples of their loss per label token, None where it has none."""

    samples: int
    tokens: int
    loss: float | None

    def to_receipt(self) -> dict[str, Any]:
        """As a receipt's line has it, the loss exactly."""
        return {"samples": self.samples, "tokens": self.tokens, "loss": None if self.loss is None else self.loss.hex()}


class SetFigures:
    """Counts sets' samples, tokens and passes from `first_step` on. Of a run of one set it gives nothing."""

    def __init__(self, plan: Plan, index: Index, first_step: int) -> None:
        self._plan, self._index, self._mixing = plan, index, plan.mixing
        self.is_active = self._mixing.names != ("",)
        self._totals = np.zeros((3, len(self._mixing.names)), np.int64)  # packs, samples, tokens
        for start in range(0, first_step, _AT_ONCE) if self.is_active else ():
            steps = range(start, min(start + _AT_ONCE, first_step))
            self._totals += plan.counts_by_set(np.concatenate([plan.packs_of(step) for step in steps]))

    def add(self, step: int, losses: np.ndarray) -> dict[str, SetStep]:
        """Takes a step, each after the one before. `losses`: of its samples, see `vltrain.receipts.history`. Returns
        each set's part of it."""
        if not self.is_active:
            return {}
        packs = self._plan.packs_of(step)
        counts = self._plan.counts_by_set(packs)
        self._totals += counts
        _, samples, tokens = counts
        of_samples = np.repeat(self._mixing.set_of(packs), self._index.num_samples[packs])
        known = ~np.isnan(losses)
        found = {}
        for number, name in enumerate(self._mixing.names):
            own = losses[(of_samples == number) & known].astype(np.float64)
            loss = float(own.mean()) if len(own) else None
            found[name] = SetStep(samples=int(samples[number]), tokens=int(tokens[number]), loss=loss)
        return found

    def totals(self) -> dict[str, dict[str, float]]:
        """By set, `samples`, `tokens` and `passes` since the run's start."""
        packs, samples, tokens = self._totals.tolist()
        return {
            name: {"samples": samples[number], "tokens": tokens[number], "passes": packs[number] / size}
            for number, (name, size) in enumerate(zip(self._mixing.names, self._mixing.num_packs, strict=True))
        }

    def log_line(self, found: Mapping[str, SetStep]) -> dict[str, float]:
        """What `log.jsonl` says of a step: loss/SET, and samples, tokens and passes since the run's start."""
        return {**_losses(found, "loss"), **self._sums("{what}")} if found else {}

    def scalars(self, found: Mapping[str, SetStep], every: bool) -> dict[str, float]:
        """What loggers get of a step; `every`: the sums, too."""
        sums = self._sums("data/{what}_of_set") if found and every else {}
        return {**_losses(found, "train/loss_by_set"), **sums}

    def _sums(self, title: str) -> dict[str, float]:
        return {
            f"{title.format(what=what)}/{name}": value
            for name, total in self.totals().items()
            for what, value in total.items()
        }


def _losses(found: Mapping[str, SetStep], title: str) -> dict[str, float]:
    return {f"{title}/{name}": one.loss for name, one in found.items() if one.loss is not None}
