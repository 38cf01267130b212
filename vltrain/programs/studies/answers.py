"""Rows of a table that no model answers here: files of answers, scored as they are."""

from __future__ import annotations

import logging
from pathlib import Path

from vltrain.config.tables import Predictions
from vltrain.errors import InputError
from vltrain.evaluate.predictions import score_predictions
from vltrain.evaluate.report import write_report
from vltrain.files.digest import file_digest
from vltrain.programs.studies.sets import answers_folder
from vltrain.programs.studies.table import DONE, FAILED, NOT_HERE, Outcome

logger = logging.getLogger(__name__)


def score_files(predictions: Predictions, split: str, folder: Path) -> dict[str, Outcome]:
    """Scores every file that is there, and writes what came of it into `folder`/ROW/eval/SPLIT, as of a run. A file
    that leaves questions out, answers others or one twice is a failed row, whose `reason` names them."""
    outcomes: dict[str, Outcome] = {}
    for row, file in predictions.files.items():
        absent = next((place for place in (file, predictions.data) if not place.exists()), None)
        if absent is not None:
            outcomes[row] = Outcome(state=NOT_HERE, reason=f"{absent} is not here")
            continue
        try:
            report = score_predictions(file, predictions.data, split, predictions.scorer, letters=predictions.letters)
            facts = {"split": split, "file": str(file), "answers": file_digest(file)}
            place = answers_folder(folder / row, "", split)
            place.mkdir(parents=True, exist_ok=True)
            write_report(report, place, facts)
        except InputError as error:
            logger.error("row %s: %s", row, error)
            outcomes[row] = Outcome(state=FAILED, reason=str(error))
            continue
        outcomes[row] = Outcome(state=DONE, metrics={**facts, **report.to_json()})
    return outcomes
