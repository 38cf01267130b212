"""The table of scorers, and a report on disk: `predictions.jsonl`, `metrics.json` and `table.md`, each whole or not
there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vltrain.errors import InputError, nearest
from vltrain.evaluate.scorers import caption, exact, iconqa, rouge, scienceqa, vqa
from vltrain.evaluate.scorers.question import prompt_text, question_of
from vltrain.evaluate.scorers.scoring import Report, Scorer, score
from vltrain.files.atomic import write_json, write_whole
from vltrain.files.lock import one_writer
from vltrain.schema import Sample

WRITE_SECONDS = 300.0  # that another process may take to write its report
SCORERS: dict[str, Scorer] = {
    "caption": caption.SCORER,
    "exact": exact.SCORER,
    "iconqa": iconqa.SCORER,
    "rouge": rouge.SCORER,
    "scienceqa": scienceqa.SCORER,
    "vqa": vqa.SCORER,
}


def find_scorer(name: str) -> Scorer:
    """The scorer of that name. Raises InputError with the nearest one."""
    if name not in SCORERS:
        raise InputError(f"eval.scorer: unknown scorer '{name}', {nearest(name, SCORERS)}")
    return SCORERS[name]


def score_samples(scorer: str, samples: Sequence[Sample], predictions: Sequence[str], where: str) -> Report:
    """The report on `predictions`, one for each sample. `where` (the samples' file) is named in errors."""
    answered = (
        (question_of(sample, where), prompt_text(sample), prediction)
        for sample, prediction in zip(samples, predictions, strict=True)
    )
    return score(scorer, find_scorer(scorer), answered)


def write_report(report: Report, folder: Path, facts: dict[str, Any]) -> None:
    """Writes `folder`/predictions.jsonl, metrics.json (the counts and `facts`) and table.md. Raises InputError if that
    is not possible."""
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in report.answers)
    # A training and an evaluation of its run may come to this at once: the files of a folder are of one of them.
    with one_writer(folder / ".writing", folder, remedy="evaluate again", wait_seconds=WRITE_SECONDS):
        write_whole(folder / "predictions.jsonl", lines)
        write_json(folder / "metrics.json", {**facts, **report.to_json()})
        write_whole(folder / "table.md", report.to_markdown() + "\n")


def measure_of(metrics: Mapping[str, Any]) -> str:
    """The name of the headline figure in a metrics.json."""
    return metrics.get("measure", "accuracy")


def mean_of(reports: Mapping[str, Report]) -> float:
    """The unweighted mean of the sets' headline figures, whatever each measures."""
    return sum(report.mean for report in reports.values()) / len(reports)


def write_mean(reports: Mapping[str, Report], path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the mean, and each set's figure with the name of its measure. Raises InputError if that is not
    possible."""
    sets = {name: {"measure": one.measure, one.measure: one.mean} for name, one in reports.items()}
    write_json(path, {**facts, "unweighted_mean": mean_of(reports), "sets": sets})
