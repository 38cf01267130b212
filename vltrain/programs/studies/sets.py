"""Rows of several sets (`data.mixture`): the splits that they answer, and one outcome of the sets' figures.

A row's own figure is the unweighted mean of its sets' headline figures, whatever each measures; each set is a column,
and rows are compared set by set, by the questions of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vltrain.config.mixture import each_set, of_set
from vltrain.config.schema import Config
from vltrain.evaluate.report import measure_of
from vltrain.prepared.origins import data_identity
from vltrain.programs.studies.comparison import Run, read_answers

MEAN = "mean of sets"


def answered_splits(config: Config, said: str | None) -> dict[str, str]:
    """The split that each set with a scorer answers, by its name; of a recipe without a mixture the one, under no name.
    `said`: for all of them; None: each set's data.test_split."""
    return {
        name: said or one.data.test_split
        for name, one in each_set(config).items()
        if not name or one.eval.scorer is not None
    }


def answers_folder(run: Path, name: str, split: str) -> Path:
    """Where a run's answers to a split of a set are, or of no set ("")."""
    return run / "eval" / name / split


def identities(config: Config, splits: Mapping[str, str]) -> Any:
    """Digest of the samples that a recipe trains on and answers, of a mixture each set's by name; None where one is not
    there, or has no record."""
    found: dict[str, str | None] = {}
    for name, one in each_set(config).items():
        with of_set(name):
            found[name] = data_identity(one, splits.get(name, one.data.train_split))
    return found[""] if "" in found else None if None in found.values() else found


def row_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One metrics.json of those of a row's sets, by name; of a row without a mixture its own, under no name.

    Of several: `measure`, the mean by that name, `columns` (each set's figure; its name is followed by what is measured
    where that is no accuracy), sums of `total` and `failed`, `step`, and `sets`, each set's whole metrics.
    """
    if "" in metrics:
        return dict(metrics[""])
    figures = {_column(name, one): float(one[measure_of(one)]) for name, one in metrics.items()}
    return {
        "measure": MEAN,
        MEAN: sum(figures.values()) / len(figures),
        "total": sum(one["total"] for one in metrics.values()),
        "failed": sum(one["failed"] for one in metrics.values()),
        "step": next(iter(metrics.values()))["step"],
        "columns": {column: {MEAN: value} for column, value in figures.items()},
        "sets": dict(metrics),
    }


def _column(name: str, metrics: Mapping[str, Any]) -> str:
    measure = measure_of(metrics)
    return name if measure == "accuracy" else f"{name} {measure}"


def runs_by_set(metrics: Mapping[str, Any], run: Path, splits: Mapping[str, str]) -> dict[str, Run]:
    """What came of each set of a run that is done, by name; of one without a mixture under no name. `metrics`: of
    `row_metrics`."""
    found: dict[str, Run] = {}
    for name, split in splits.items():
        own = metrics["sets"][name] if name else metrics
        answers = read_answers(answers_folder(run, name, split) / "predictions.jsonl")
        found[name] = Run(measure=measure_of(own), value=own[measure_of(own)], answers=answers)
    return found
