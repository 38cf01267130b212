"""The table of an ablation: a line per row, what is different in it, what it trained and how well it answered.

A run's outcome is a file of its own (`ROW/row.json`, with seeds `ROW/seed-N/row.json`), so that a table is put together
from what is on the disk, whoever ran it and when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vltrain.data.folder import new_folder
from vltrain.errors import InputError
from vltrain.evaluate.report import measure_of
from vltrain.files.atomic import write_json, write_whole
from vltrain.files.strict_json import read_object
from vltrain.metrics.hparams import write_hparams
from vltrain.programs.studies.comparison import Seed
from vltrain.programs.studies.significance import Spread, spread_of

OUTCOME = "row.json"
_SEED = "seed-"  # before its number: the folder of a run among its row's
HPARAMS = "hparams"  # of the table's folder
WAITING, RUNNING, TRAINED, FAILED, DONE = "waiting", "running", "trained", "failed", "done"
NOT_HERE = "not here"  # of a file of answers


@dataclass(kw_only=True)
class Outcome:
    """Where a row stands, and what came of it once it is done."""

    state: str = WAITING
    """waiting, running (or interrupted while it ran), trained (but not evaluated), failed, done; or not here."""
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


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """A row's runs. `spread`: of its measure over those that are done, as a share; None before the first."""

    done: int
    wanted: int
    spread: Spread | None


def pooled(runs: Mapping[Seed, Outcome]) -> tuple[Outcome, Seeds]:
    """The runs of a row as one outcome: means of figures over those that are done, sums of seconds and of failed
    answers. Where none is done, its state is that of the one that came furthest."""
    done = [run for run in runs.values() if run.state == DONE]
    seconds = {
        "seconds": sum(run.seconds for run in runs.values()),
        "evaluation_seconds": sum(run.evaluation_seconds for run in runs.values()),
    }
    if not done:
        furthest = max(runs.values(), key=lambda run: (WAITING, FAILED, RUNNING, TRAINED).index(run.state))
        return replace(furthest, **seconds), Seeds(done=0, wanted=len(runs), spread=None)
    measure = measure_of(done[0].metrics)
    spread = spread_of([run.metrics[measure] for run in done])
    names = dict.fromkeys(name for run in done for name in run.metrics["columns"])
    columns: dict[str, Any] = {}
    for name in names:
        shares = [run.metrics["columns"].get(name, {}).get(measure) for run in done]
        known = [share for share in shares if share is not None]
        columns[name] = {measure: spread_of(known).mean if known else None}
    totals = {run.metrics["total"] for run in done}
    metrics = {
        "measure": measure,
        measure: spread.mean,
        "total": totals.pop() if len(totals) == 1 else "differ",
        "failed": sum(run.metrics["failed"] for run in done),
        "columns": columns,
    }
    whole = replace(done[0], reason=None, metrics=metrics, made_with={}, **seconds)
    return whole, Seeds(done=len(done), wanted=len(runs), spread=spread)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a table tells beside its runs. `states`: of rows that are not done, in words; `planned`: see
    `vltrain.programs.studies.planned`; `sections`: further tables, each with its title; `records`: further keys of
    table.json."""

    states: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sections: Sequence[tuple[str, list[list[str]], int]] = ()
    records: Mapping[str, Any] = field(default_factory=dict)


def write_table(
    folder: Path,
    differences: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Mapping[Seed, Outcome]],
    beside: Beside | None = None,
) -> str:
    """Writes table.md and table.json.

    Args:
        differences: by row, in the table's order: its own settings by dotted name.
        runs: by row and seed; of a row that is run once, its outcome under None.

    Returns: the Markdown.
    """
    beside = beside or Beside()
    rows, seeds = pooled_rows(runs)
    records: list[dict[str, Any]] = []
    for row, settings in differences.items():
        record: dict[str, Any] = {"row": row, "settings": dict(settings), **_plain_outcome(rows[row])}
        if row in seeds:
            told = {str(seed): _plain_outcome(outcome) for seed, outcome in runs[row].items()}
            spread = seeds[row].spread
            record |= {"seeds": told, "done": seeds[row].done, "spread": spread and asdict(spread)}
        if row in beside.planned:
            record["planned"] = dict(beside.planned[row])
        records.append(record)
    write_json(folder / "table.json", {"rows": records, **beside.records})
    text = to_markdown(differences, rows, seeds, beside)
    for title, lines, texts in beside.sections:
        text += f"\n\n{title}\n\n{aligned(lines, texts)}"
    write_whole(folder / "table.md", text + "\n")
    return text


def pooled_rows(runs: Mapping[str, Mapping[Seed, Outcome]]) -> tuple[dict[str, Outcome], dict[str, Seeds]]:
    """Each row's outcome, and of rows with seeds their spread."""
    both = {row: pooled(by_seed) for row, by_seed in runs.items() if None not in by_seed}
    rows = {row: both[row][0] if row in both else by_seed[None] for row, by_seed in runs.items()}
    return rows, {row: seeds for row, (_, seeds) in both.items()}


def _plain_outcome(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(outcome).items() if name != "made_with"}


def write_hparams_table(
    folder: Path, settings: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Mapping[Seed, Outcome]]
) -> None:
    """Writes the runs that are done for TensorBoard's tab HPARAMS, into `folder`/hparams; those of seeds with the row's
    mean and interval beside their own figure.

    Args:
        settings: by row, the settings in which rows differ, by dotted name.
        runs: by row and seed, see `write_table`.
    """
    done = [(row, seed, one) for row in settings for seed, one in runs[row].items() if one.state == DONE]
    if not done:
        return
    with new_folder(folder / HPARAMS, replace=True) as table:
        for row, seed, outcome in done:
            measure = measure_of(outcome.metrics)
            columns = {
                f"{measure} of {name}": column[measure]
                for name, column in outcome.metrics["columns"].items()
                if name != "Average" and column.get(measure) is not None
            }
            figures = {measure: outcome.metrics[measure], **columns, "seconds": outcome.seconds}
            spread = None if seed is None else pooled(runs[row])[1].spread
            if spread is not None and spread.half_width is not None:
                figures |= {f"mean {measure}": spread.mean, f"95% interval of {measure}": spread.half_width}
            own = settings[row] if seed is None else {**settings[row], "train.seed": seed}
            figures["trained parameters"] = float(outcome.trained or 0)
            write_hparams(table, row if seed is None else f"{row}/{seed_folder(seed)}", own, figures)


def seed_folder(seed: int) -> str:
    """The name of a seed's folder in that of its row."""
    return f"{_SEED}{seed}"


def seed_of(folder: Path) -> int | None:
    """The seed whose run the folder is; None for one that is named otherwise."""
    number = folder.name.removeprefix(_SEED)
    return int(number) if number != folder.name and number.isdecimal() else None


def to_markdown(
    differences: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Outcome],
    seeds: Mapping[str, Seeds] | None = None,
    beside: Beside | None = None,
) -> str:
    """The table: accuracies and shares in per cent; a row that is not done says where it stands in the place of its
    accuracy.

    Trained parameters are a share of all, or for an InstructBLIP of those that full tuning of its Q-Former trains. With
    `seeds`, figures are means over them, seconds and failed answers sums.
    """
    beside = beside or Beside()
    done = [outcome.metrics for outcome in outcomes.values() if outcome.state == DONE]
    columns = list(dict.fromkeys(name for metrics in done for name in metrics["columns"] if name != "Average"))
    measures = list(dict.fromkeys(measure_of(metrics) for metrics in done)) or ["accuracy"]
    of_qformer = any(outcome.full_qformer for outcome in outcomes.values())
    of_qformer |= any(plan.get("of_qformer") for plan in beside.planned.values())
    share = "% of full Q-Former" if of_qformer else "% trained"
    spreads = ["sd", "± 95%", "seeds"] if seeds else []
    plans = ["planned GiB", "planned hours"] if beside.planned else []
    titles = ["row", "different", "trained", share, *measures, *spreads, *columns]
    lines = [[*titles, "questions", "failed", "seconds", "steps", *plans]]
    for row, settings in differences.items():
        outcome = outcomes[row]
        state = beside.states.get(row, outcome.state)
        told = ", ".join(f"{key.removeprefix('model.')} {_plain(value)}" for key, value in settings.items())
        head = [row, told or "nothing", *_trained(outcome, beside.planned.get(row))]
        spread = _spread((seeds or {}).get(row)) if spreads else []
        plan = _plan(beside.planned.get(row)) if plans else []
        lines.append([*head, *_figures(outcome, state, measures, spread, columns), *plan])
    return aligned(lines)


def _trained(outcome: Outcome, planned: Mapping[str, Any] | None) -> list[str]:
    """Trained parameters and their share, of a row that is done or planned."""
    if outcome.trained is not None and outcome.parameters is not None and outcome.state == DONE:
        share = outcome.trained / (outcome.full_qformer or outcome.parameters)
        return [f"{outcome.trained:,}", f"{100 * share:.2f}"]
    return ["", ""] if planned is None else [f"{planned['trained']:,}", f"{100 * planned['trained_share']:.2f}"]


def _figures(
    outcome: Outcome, state: str, measures: Sequence[str], spread: Sequence[str], columns: Sequence[str]
) -> list[str]:
    seconds = "" if outcome.state == NOT_HERE else f"{outcome.seconds:.0f}"
    if outcome.state != DONE:
        return [state, *[""] * (len(measures) - 1), *spread, *[""] * len(columns), "", "", seconds, ""]
    metrics = outcome.metrics
    shares = [_share(metrics[measure]) if measure_of(metrics) == measure else "" for measure in measures]
    by_column = [_share(metrics["columns"].get(name, {}).get(measure_of(metrics))) for name in columns]
    steps = "" if outcome.steps is None else str(outcome.steps)
    return [*shares, *spread, *by_column, str(metrics["total"]), str(metrics["failed"]), seconds, steps]


def _spread(seeds: Seeds | None) -> list[str]:
    if seeds is None:
        return ["", "", ""]
    spread = seeds.spread
    shares = ["", ""] if spread is None else [_share(spread.sd), _share(spread.half_width)]
    return [*shares, str(seeds.done) if seeds.done == seeds.wanted else f"{seeds.done} of {seeds.wanted}"]


def _plan(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return ["", ""]
    return [f"{plan['peak_gib']:.1f}", "–" if plan["hours"] is None else f"{plan['hours']:.1f}"]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{name} {_plain(one)}" for name, one in value.items())
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def aligned(lines: list[list[str]], texts: int = 2) -> str:
    """A Markdown table; the first `texts` columns to the left, figures to the right."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[place]) for line in cells)) for place in range(len(cells[0]))]
    rows = []
    for line in cells:
        padded = [
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ]
        rows.append(f"| {' | '.join(padded)} |")
    rules = (f" {'-' * width} " if place < texts else f" {'-' * (width - 1)}: " for place, width in enumerate(widths))
    return "\n".join([rows[0], f"|{'|'.join(rules)}|", *rows[1:]])
