"""Files of answers, ours or anybody's: which question each text answers.

    predictions.jsonl      ours: {"id", "prediction"} a line
    answers.jsonl          LLaVA-1.5's: {"question_id", "text"} a line
    ..._cache.jsonl        Chameleon's: {"pid", "prediction"} a line, the prediction being a choice's text
    result.json            LLaVA's and ScienceQA's: {"outputs": {pid: text}, ...}; Chameleon's {"results": {pid:
    {"prediction": text}}} predictions_ans_*.json Multimodal-CoT's: {"preds": [text], "labels": [text]}, in the order of
    the split, "The answer is (B)."
    anything.json          {pid: text}; or VQA's and captions' lists: [{"question_id", "answer"}], [{"image_id",
    "caption"}]

Lines may hold what lists do, and the other way round. An id is a text or a whole number; one that is answered twice is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.strict_json import expect, id_text, is_list, read_json, read_lines, shown

OURS, LLAVA, CHAMELEON, MMCOT, RESULTS, PLAIN = (
    "vltrain's predictions",
    "LLaVA's answers",
    "Chameleon's predictions",
    "Multimodal-CoT's predictions",
    "a result file's outputs",
    "answers by id",
)
KEYS = {
    ("id", "prediction"): OURS,
    ("question_id", "text"): LLAVA,
    ("pid", "prediction"): CHAMELEON,
    ("question_id", "answer"): PLAIN,
    ("image_id", "caption"): PLAIN,
}
KNOWN = "expected a format that is known: see vltrain/evaluate/prediction_files.py"


@dataclass(frozen=True, kw_only=True)
class PredictionFile:
    """texts: by id, in the file's order. kind: which format it is, in words. labels: the right answers that the file
    tells itself, by id."""

    path: Path
    kind: str
    texts: dict[str, str]
    labels: dict[str, str]


def read_prediction_file(path: Path, order: Sequence[str] | None = None) -> PredictionFile:
    """Reads a file of answers.

    Args:
        order: the ids of the split's questions, for a file that has none of its own; None: such a file is refused.

    Raises: InputError for anything malformed, naming file, line or path, and key.
    """
    if path.suffix == ".jsonl":
        return _by_record(path, read_lines(path, "a file of answers"))
    content = read_json(path, "a file of answers")
    if is_list(content):
        return _by_record(path, ((f"{path}: [{number}]", record) for number, record in enumerate(content)))
    expect(content, dict, str(path))
    if type(content.get("preds")) is list:
        return _in_order(path, content, order)
    if type(content.get("outputs")) is dict:
        return PredictionFile(
            path=path, kind=RESULTS, texts=_texts(path, "outputs: ", content["outputs"].items()), labels={}
        )
    if type(content.get("results")) is dict:
        results = content["results"].items()
        if not all(type(result) is dict and "prediction" in result for _, result in results):
            raise InputError(
                f"{path}: results: found no texts (prediction) in it, so answers cannot be judged; {KNOWN}"
            )
        texts = _texts(path, "results: ", ((pid, result["prediction"]) for pid, result in results))
        return PredictionFile(path=path, kind=CHAMELEON, texts=texts, labels={})
    if {"acc", "correct", "count"} <= content.keys():
        raise InputError(
            f"{path}: found figures only (acc, correct, count), expected answers; Chameleon's are in its "
            "..._cache.jsonl"
        )
    return PredictionFile(path=path, kind=PLAIN, texts=_texts(path, "", content.items()), labels={})


def _texts(path: Path, inside: str, answers: Iterable[tuple[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pid, text in answers:
        if type(text) is not str:
            raise InputError(f"{path}: {inside}'{pid}': found {shown(text)}, expected a text (the predicted answer)")
        found[pid] = text
    return found


def _by_record(path: Path, records: Iterator[tuple[str, Any]]) -> PredictionFile:
    texts: dict[str, str] = {}
    kind, keys = OURS, None
    for where, record in records:
        expect(record, dict, where)
        if keys is None:
            keys = next(
                (pair for wanted in (2, 1) for pair in KEYS if sum(key in record for key in pair) == wanted), None
            )
            if keys is None:
                pairs = "; ".join(" and ".join(pair) for pair in KEYS)
                raise InputError(f"{where}: found the keys {', '.join(record) or 'none'}, expected one of: {pairs}")
            kind = KEYS[keys]
        name, text = (record.get(key) for key in keys)
        name = id_text(name, f"{where}: {keys[0]}")
        if type(text) is not str:
            raise InputError(
                f"{where}: {keys[1]}: found {shown(text) if keys[1] in record else 'nothing'}, expected a text"
            )
        if name in texts:
            raise InputError(f"{where}: a second answer to '{name}'")
        texts[name] = text
    return PredictionFile(path=path, kind=kind, texts=texts, labels={})


def _in_order(path: Path, content: dict[str, Any], order: Sequence[str] | None) -> PredictionFile:
    """Multimodal-CoT's: the texts alone."""
    if order is None:
        raise InputError(
            f"{path}: found a list of texts without ids (preds, of Multimodal-CoT), which only a split's order "
            f"could tell apart; write {{id: text}}"
        )
    columns: dict[str, dict[str, str]] = {}
    for key in ("preds", "labels"):
        listed = expect(content.get(key, []), list, f"{path}: {key}")
        if len(listed) != len(order) and (key == "preds" or listed):
            raise InputError(
                f"{path}: {key}: found {len(listed)} texts, expected {len(order)}, one for each question of the "
                "split in its order"
            )
        columns[key] = dict(
            zip(order, (expect(text, str, f"{path}: {key}[{number}]") for number, text in enumerate(listed)))
        )
    return PredictionFile(path=path, kind=MMCOT, texts=columns["preds"], labels=columns["labels"])
