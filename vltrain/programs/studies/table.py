"""The table of an ablation: a line per row, what is different in it, what it trained and how well it answered.

A row's outcome is a file of its own (`ROW/row.json`), so that a table is put together from what is on the disk, whoever
ran it and when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vltrain.data.folder import new_folder
from vltrain.errors import InputError
from vltrain.files.atomic import write_json, write_whole
from vltrain.files.strict_json import read_object
from vltrain.metrics.hparams import write_hparams

OUTCOME = "row.json"
HPARAMS = "hparams"  # of the table's folder
WAITING, RUNNING, TRAINED, FAILED, DONE = "waiting", "running", "trained", "failed", "done"


@dataclass(kw_only=True)
class Outcome:
    """Where a row stands, and what came of it once it is done."""

    state: str = WAITING
    """waiting, running (or interrupted while it ran), trained (but not evaluated), failed, done."""
    reason: str | None = None
    """Why it failed."""
    seconds: float = 0.0
    """Wall-clock time of its training, starts and evaluations in between included, over all attempts that could
    tell."""
    evaluation_seconds: float = 0.0
    """Wall-clock time of its last evaluation."""
    parameters: int | None = None
    trained: int | None = None
    """Of `parameters`, those that were trained."""
    full_qformer: int | None = None
    """Of an InstructBLIP, what full tuning of its Q-Former would train: the whole that its percentage is of."""
    steps: int | None = None
    """Optimizer steps behind the model that answered."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The evaluation's metrics.json."""
    made_with: dict[str, Any] = field(default_factory=dict)
    """The settings that make its figures what they are, by dotted name."""


def read_outcome(folder: Path) -> Outcome:
    """What `folder` says of its row. Raises InputError for a damaged file."""
    path = folder / OUTCOME
    if not path.exists():
        return Outcome()
    try:
        return Outcome(**read_object(path))
    except (InputError, TypeError) as error:
        raise InputError(
            f"{path}: not the outcome of a row ({error}); remove the file, and the row is evaluated again"
        ) from None


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes `folder`/row.json, whole or not at all. Raises InputError if that is not possible."""
    write_json(folder / OUTCOME, asdict(outcome))


def write_table(folder: Path, differences: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> str:
    """Writes table.md and table.json.

    Args:
        differences: by row, in the table's order: its own settings by dotted name.
        outcomes: by row.

    Returns: the Markdown.
    """
    records = []
    for row, settings in differences.items():
        outcome = asdict(outcomes[row])
        del outcome["made_with"]
        records.append({"row": row, "settings": dict(settings), **outcome})
    write_json(folder / "table.json", {"rows": records})
    text = to_markdown(differences, outcomes)
    write_whole(folder / "table.md", text + "\n")
    return text


def write_hparams_table(
    folder: Path, settings: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, Outcome]
) -> None:
    """Writes the rows that are done for TensorBoard's tab HPARAMS, into `folder`/hparams.

    Args:
        settings: by row, the settings in which rows differ, by dotted name.
    """
    done = {row: outcome for row, outcome in outcomes.items() if outcome.state == DONE}
    if not done:
        return
    with new_folder(folder / HPARAMS, replace=True) as table:
        for row, outcome in done.items():
            measure = _measure(outcome.metrics)
            columns = {
                f"{measure} of {name}": column[measure]
                for name, column in outcome.metrics["columns"].items()
                if name != "Average" and column.get(measure) is not None
            }
            figures = {measure: outcome.metrics[measure], **columns, "seconds": outcome.seconds}
            write_hparams(table, row, settings[row], {**figures, "trained parameters": float(outcome.trained or 0)})


def to_markdown(differences: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> str:
    """The table: accuracies and shares in per cent; a row that is not done says where it stands in the place of its
    accuracy.

    Trained parameters are a share of all, or for an InstructBLIP of those that full tuning of its Q-Former trains.
    """
    done = [outcome.metrics for outcome in outcomes.values() if outcome.state == DONE]
    columns = list(dict.fromkeys(name for metrics in done for name in metrics["columns"] if name != "Average"))
    measures = list(dict.fromkeys(_measure(metrics) for metrics in done)) or ["accuracy"]
    of_qformer = any(outcome.full_qformer for outcome in outcomes.values())
    share = "% of full Q-Former" if of_qformer else "% trained"
    header = ["row", "different", "trained", share, *measures, *columns, "questions", "failed", "seconds", "steps"]
    lines = [_line(row, differences[row], outcomes[row], measures, columns) for row in differences]
    return _aligned([header, *lines])


def _line(
    row: str, settings: Mapping[str, Any], outcome: Outcome, measures: Sequence[str], columns: Sequence[str]
) -> list[str]:
    told = ", ".join(f"{key.removeprefix('model.')} {_plain(value)}" for key, value in settings.items()) or "nothing"
    if outcome.state != DONE:
        return [
            row,
            told,
            "",
            "",
            outcome.state,
            *[""] * (len(measures) - 1 + len(columns)),
            "",
            "",
            f"{outcome.seconds:.0f}",
            "",
        ]
    assert outcome.trained is not None and outcome.parameters is not None
    metrics = outcome.metrics
    shares = [_share(metrics[measure]) if _measure(metrics) == measure else "" for measure in measures]
    by_column = [_share(metrics["columns"].get(name, {}).get(_measure(metrics))) for name in columns]
    counts = [str(metrics["total"]), str(metrics["failed"]), f"{outcome.seconds:.0f}", str(outcome.steps)]
    share = f"{100 * outcome.trained / (outcome.full_qformer or outcome.parameters):.2f}"
    return [row, told, f"{outcome.trained:,}", share, *shares, *by_column, *counts]


def _measure(metrics: Mapping[str, Any]) -> str:
    return metrics.get("measure", "accuracy")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _aligned(lines: list[list[str]]) -> str:
    """A Markdown table; names to the left, figures to the right."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[place]) for line in cells)) for place in range(len(cells[0]))]
    rows = []
    for line in cells:
        padded = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ]
        rows.append(f"| {' | '.join(padded)} |")
    rule = (
        "|"
        + "|".join(f" {'-' * width} " if place < 2 else f" {'-' * (width - 1)}: " for place, width in enumerate(widths))
        + "|"
    )
    return "\n".join([rows[0], rule, *rows[1:]])
