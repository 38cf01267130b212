"""The first step in which two runs' losses part, and what was different in it.

A step's loss follows from its samples and from all steps before, so what differed earlier is told, too: a learning rate
that differs in step 0 shows in the loss of step 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vltrain.programs.compare.differences import shown
from vltrain.programs.compare.record import RunRecord, Step
from vltrain.receipts.verify import relative_difference


@dataclass(frozen=True, kw_only=True)
class Parting:
    """How the losses of two runs compare.

    Args:
        common: steps that both have done, in order.
        step: the first whose losses differ by more than the tolerance; None: none.
        largest: relative difference of the losses before it, or of all.
        rows: of that step (name, this one, the other, the first step in which they differ or None).
    """

    one: RunRecord
    other: RunRecord
    tolerance: float
    common: Sequence[int]
    step: int | None = None
    largest: float = 0.0
    rows: Sequence[tuple[str, Any, Any, int | None]] = field(default_factory=tuple)

    def lines(self) -> list[str]:
        """For people."""
        title = f"losses of {self.one.name} and {self.other.name}"
        if not self.common:
            return [f"{title}: no step in common"]
        equal = "bit for bit" if self.largest == 0 else f"to a relative {self.largest:.1e}"
        if self.step is None:
            return [f"{title}: equal {equal} in all {len(self.common)} common steps"]
        before = sum(step < self.step for step in self.common)
        told = f"; equal {equal} in the {before} before" if before else ""
        rows = [
            [name, shown(own), shown(theirs), _since(self.step, first, own, theirs)]
            for name, own, theirs, first in self.rows
        ]
        widths = [max(len(row[place]) for row in rows) for place in range(3)]
        return [
            f"{title}: part at step {self.step} (a relative difference of more than {self.tolerance:g}){told}",
            *("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows),
        ]


def _since(step: int, first: int | None, own: Any, theirs: Any) -> str:
    if own is None or theirs is None:
        return "not known: no receipt"
    if first is None:
        return "the same"
    return "differs" if first == step else f"differs since step {first}"


def part(one: RunRecord, other: RunRecord, tolerance: float) -> Parting:
    """Compares two runs of the same data step by step. `tolerance`: relative difference of losses that counts as
    equal."""
    common = [step for step in one.steps if step in other.steps]
    largest = 0.0
    for place, step in enumerate(common):
        difference = relative_difference(one.steps[step].loss, other.steps[step].loss)
        if difference > tolerance:
            return Parting(
                one=one,
                other=other,
                tolerance=tolerance,
                common=common,
                step=step,
                largest=largest,
                rows=_rows(one, other, common[: place + 1], tolerance),
            )
        largest = max(largest, difference)
    return Parting(one=one, other=other, tolerance=tolerance, common=common, largest=largest)


def _rows(
    one: RunRecord, other: RunRecord, steps: Sequence[int], tolerance: float
) -> list[tuple[str, Any, Any, int | None]]:
    """What was known of the last of `steps`, and since when it differs. Gradient norms differ like losses, by more than
    the tolerance."""
    last = steps[-1]

    def row(name: str, value: Callable[[Step], Any], differ: Callable[[Any, Any], bool]) -> Any:
        pairs = ((step, value(one.steps[step]), value(other.steps[step])) for step in steps)
        first = next((step for step, own, theirs in pairs if None not in (own, theirs) and differ(own, theirs)), None)
        return name, value(one.steps[last]), value(other.steps[last]), first

    def apart(own: Any, theirs: Any) -> bool:
        return own != theirs

    def far(own: float, theirs: float) -> bool:
        return relative_difference(own, theirs) > tolerance

    rows = [
        row("loss", lambda step: step.loss, far),
        row("samples", lambda step: step.samples, apart),
        row("label tokens", lambda step: step.label_tokens, apart),
        row("learning rate", lambda step: step.lr, apart),
        row("gradient norm", lambda step: step.grad_norm, far),
        row("update skipped", lambda step: step.skipped, apart),
    ]
    ranks = one.facts.get("ranks"), other.facts.get("ranks")
    if None not in ranks:  # of the newest lives, which is all that a run keeps
        rows.append(("ranks", *ranks, 0 if ranks[0] != ranks[1] else None))
    return rows


def receipt_lines(runs: Sequence[RunRecord]) -> tuple[list[str], bool]:
    """What the receipts say, and whether each that is there is whole: its chain, and beside the first one's the same
    samples."""
    lines: list[str] = []
    for run in runs:
        if run.receipt is None:
            lines.append(f"--      {run.name}: no receipt, so that its samples are not known")
        elif run.receipt.problem is not None:
            lines.append(f"FAILED  {run.name}: {run.receipt.problem}")
        else:
            header = run.receipt.header
            lines.append(f"ok      {run.name}: chain of {len(run.receipt.lines)} of {header.num_steps} steps is whole")
    first, *others = [run for run in runs if run.receipt is not None] or [None]
    for other in others:
        assert first is not None and other is not None
        lines.append(_beside(first, other))
    return lines, all(run.receipt is None or run.receipt.problem is None for run in runs)


def _beside(one: RunRecord, other: RunRecord) -> str:
    assert one.receipt is not None and other.receipt is not None
    what = f"{other.name} beside {one.name}"
    if one.receipt.header.data != other.receipt.header.data:
        return f"--      {what}: other data"
    theirs = {line.step: line.samples for line in other.receipt.lines}
    common = [line for line in one.receipt.lines if line.step in theirs]
    first = next((line.step for line in common if line.samples != theirs[line.step]), None)
    same = "the same run" if one.receipt.header.run == other.receipt.header.run else "another run by its identity"
    if first is not None:
        return f"--      {what}: {same}; other samples from step {first} on"
    return f"ok      {what}: {same}; the same samples in all {len(common)} common steps"
