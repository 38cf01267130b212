"""The history proven from the receipt: a step's losses, weighted by their label tokens, add up to the step's loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from vltrain.data.plan import Plan
from vltrain.data.shards import PackedDataset
from vltrain.receipts.history import HISTORY, History, read_history
from vltrain.receipts.receipt import Line, Receipt

TOLERANCE = 1e-4  # relative: both are sums in fp32, of thousands of tokens in different orders


def compare_history(run: Path, receipt: Receipt, plan: Plan, dataset: PackedDataset) -> tuple[str | None, str]:
    """(what does not agree, and where first; what does) of a run's history and receipt.

    Raises: InputError for a file that is no history.
    """
    if not (run / HISTORY).exists():
        return None, "history: not recorded (a run of an earlier version)"
    history = read_history(run)
    header, last = receipt.header, receipt.header.first_step + len(receipt.lines)
    if (history.run, history.data) != (header.run, header.data):
        return f"{history.path}: the history of another run", ""
    reached = history.first_step + history.num_steps
    if reached < last:
        return f"history: ends after {reached} step(s), the receipt has {last}: losses are missing", ""
    num_losses, largest = 0, 0.0
    for line in receipt.lines[max(0, history.first_step - header.first_step) :]:
        if line.step >= plan.num_steps:
            break
        counts = np.concatenate([_label_tokens(dataset, pack) for pack in plan.packs_of(line.step).tolist()])
        difference = _difference(history, line, counts)
        if isinstance(difference, str):
            return f"history: step {line.step}: {difference}", ""
        num_losses, largest = num_losses + len(counts), max(largest, difference)
    begins = f" from step {history.first_step} on (of earlier ones it has none)" if history.first_step else ""
    return None, f"history: {num_losses:,} losses{begins}, each step's sum is the receipt's to {largest:.1e}"


def _label_tokens(dataset: PackedDataset, pack: int) -> np.ndarray:
    """int64 [S], label tokens of each sample of a pack."""
    row = dataset.row(pack)
    ends = np.cumsum(row.segment_lengths, dtype=np.int64)
    return np.add.reduceat(row.loss_mask, ends - row.segment_lengths, dtype=np.int64)


def _difference(history: History, line: Line, counts: np.ndarray) -> float | str:
    """How far, relatively, the sum of a step's losses is from its loss in the receipt; what is wrong in words where
    that is too far. `counts`: int64 [samples], label tokens of each."""
    losses = history.losses(line.step)
    if len(losses) != len(counts):
        return f"{len(losses)} losses, the plan has {len(counts)} samples"
    labelled = counts > 0
    loss = float((losses[labelled].astype(np.float64) * counts[labelled]).sum() / counts.sum())
    expected = line.loss_value
    if not (math.isfinite(loss) and math.isfinite(expected)):
        equal = math.isfinite(loss) == math.isfinite(expected)
    else:
        equal = abs(loss - expected) <= TOLERANCE * abs(expected)
    if not equal:
        return f"its losses add up to {loss!r}, the receipt says {expected!r}"
    return abs(loss - expected) / abs(expected) if expected and math.isfinite(expected) else 0.0
