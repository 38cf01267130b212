"""Scores a file of ScienceQA answers, ours or anybody's, against the published problems.

Three formats are known: {pid: text}; the result files of LLaVA and its kin, {"outputs": {pid: text}, ...}; and our own
`predictions.jsonl`. A score is only comparable if every question of the split was answered, so missing ids are an error and not a
smaller denominator; ids that the split does not have are one too, since they mean that the wrong split was named.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from vltrain.errors import InputError, nearest
from vltrain.evaluate.report import find_scorer
from vltrain.evaluate.scoring import Question, Report, score

MAX_NAMED = 3


def score_predictions(predictions: Path, data: Path, split: str) -> Report:
    """The ScienceQA report on a file of answers.

    Args:
        predictions: see the module.
        data: folder with problems.json and pid_splits.json.
        split: a name in pid_splits.json.

    Raises: InputError for unreadable files, missing fields (file, pid and key are named), and ids that do not match the split.
    """
    questions = read_questions(data, split)
    texts = read_predictions(predictions)
    known = {question.id for question in questions}
    for problem, ids in (("has no answer to", known - texts.keys()), ("answers unknown", texts.keys() - known)):
        if ids:
            found = f"{problem} {len(ids)} question(s) of split '{split}' ({name_some(ids)})"
            raise InputError(f"{predictions}: {found}; expected its {len(known)} ids exactly")
    return score("scienceqa", find_scorer("scienceqa"), ((question, question.reference, texts[question.id]) for question in questions))


def read_questions(data: Path, split: str) -> list[Question]:
    """The questions of a ScienceQA split in its own order. `reference` holds the question's text."""
    splits = _read_object(data / "pid_splits.json")
    if split not in splits:
        raise InputError(f"{data / 'pid_splits.json'}: no split '{split}', {nearest(split, splits)}")
    problems = _read_object(data / "problems.json")
    questions = []
    for pid in map(str, _expect(splits[split], list, f"{data / 'pid_splits.json'}: {split}", "a list of ids")):
        where = f"{data / 'problems.json'}: problem '{pid}'"
        if pid not in problems:
            raise InputError(f"{where}: missing, though pid_splits.json lists it in '{split}'")
        problem = _expect(problems[pid], dict, where, "an object")
        for key in ("question", "image"):
            if key not in problem:
                raise InputError(f"{where}: {key}: found nothing, expected {'a text' if key == 'question' else 'a file name or null'}")
        has_image = problem["image"] is not None
        questions.append(Question(id=pid, reference=str(problem["question"]), metadata=problem, has_image=has_image, where=where))
    return questions


def read_predictions(path: Path) -> dict[str, str]:
    """{id: predicted text} of a file in one of the three formats."""
    if path.suffix == ".jsonl":
        return _read_lines(path)
    content = _read_object(path)
    outputs = content["outputs"] if isinstance(content.get("outputs"), dict) else content
    for pid, text in outputs.items():
        _expect(text, str, f"{path}: '{pid}'", "a text (the predicted answer)")
    return outputs


def _read_lines(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        record = _expect(_parse(line, where), dict, where, "an object with id and prediction")
        for key in ("id", "prediction"):
            _expect(record.get(key), str, f"{where}: {key}", "a text")
        if record["id"] in texts:
            raise InputError(f"{where}: a second answer to '{record['id']}'")
        texts[record["id"]] = record["prediction"]
    return texts


def _read_object(path: Path) -> dict[str, Any]:
    return _expect(_parse(_read_text(path), str(path)), dict, str(path), "a JSON object")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if repeated is not None:
            raise InputError(f"{where}: found '{repeated}' a second time")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not JSON ({error})") from None


def _expect(value: Any, kind: type, where: str, expected: str) -> Any:
    if not isinstance(value, kind):
        found = repr(value) if len(repr(value)) < 60 else type(value).__name__
        raise InputError(f"{where}: found {found}, expected {expected}")
    return value


def name_some(ids: Set[str]) -> str:
    """The first of `ids`, for an error."""
    first = sorted(ids, key=lambda pid: (len(pid), pid))[:MAX_NAMED]
    return ", ".join(first) + (", ..." if len(ids) > MAX_NAMED else "")
