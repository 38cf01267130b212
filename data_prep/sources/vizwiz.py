"""VizWiz-VQA (Gurari et al., 2018): photos by blind people, their questions, ten answers each, from the official files.

    train.json, val.json   [{image, question, answers: [{answer, answer_confidence}] * 10, answer_type, answerable}], also in Annotations/
    train/, val/           the images, also in Images/

test.json has no answers, so nothing can be learned or scored from it: it is left out, and said so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import choose, settle
from data_prep.sources.prompts import check_template, plain
from data_prep.sources.raw import RawSample, field, image_name, read_json
from vltrain.errors import InputError
from vltrain.schema import IMAGE_MARKER, Sample, Turn

SPLITS = ("train", "val")
CONFIDENCES = ("yes", "maybe", "no")


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads train and val, those of them that are there.

    Args:
        input: the folder of the files above.
        options: `prompt` with the place {question}; `target`, which of the ten answers is learned: the `majority` (of equals the first)
            or the `first`, as the paper's code does; `unanswerable`: `keep`, or `drop` to leave questions out that are marked so, in
            train only.

    Raises:
        InputError: nothing there, or a missing or malformed field: named with file, number, image and key.
    """
    settled = settle("vizwiz", options, {"prompt": "Question: {question} Short answer:", "target": "majority", "unanswerable": "keep"})
    check_template("vizwiz", "prompt", settled["prompt"], ("question",))
    choose("vizwiz", "target", settled["target"], ("majority", "first"))
    choose("vizwiz", "unanswerable", settled["unanswerable"], ("keep", "drop"))
    if input is None:
        raise InputError("source 'vizwiz' needs --input, the folder of train.json, val.json and the images")
    files = {split: _first(input, f"{split}.json", "Annotations") for split in (*SPLITS, "test")}
    if not any(files[split] for split in SPLITS):
        raise InputError(f"{input}: found neither {' nor '.join(f'{split}.json' for split in SPLITS)} in it or in its Annotations")
    for split in SPLITS:
        if (path := files[split]) is not None:
            yield from _read_split(path, split, _first(input, split, "Images") or input / split, settled)
    if files["test"] is not None:
        print(f"{files['test']}: left out, it has no answers")


def _first(input: Path, name: str, folder: str) -> Path | None:
    return next((path for path in (input / name, input / folder / name) if path.exists()), None)


def _read_split(path: Path, split: str, images: Path, settled: Mapping[str, Any]) -> Iterator[RawSample]:
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path}: found a {type(records).__name__}, expected a list of questions")
    for number, record in enumerate(records):
        name = image_name(record, "image", f"{path}: question {number}")
        where = f"{path}: question {number} ('{name}')"
        answers = _answers(field(record, "answers", list, where), where)
        answerable = field(record, "answerable", int, where)
        if answerable not in (0, 1):
            raise InputError(f"{where}: answerable: found {answerable}, expected 0 or 1")
        if split == "train" and settled["unanswerable"] == "drop" and not answerable:
            continue
        question = plain(field(record, "question", str, where))
        texts = [answer for answer in answers if answer]
        target = texts[0] if settled["target"] == "first" else Counter(texts).most_common(1)[0][0]
        sample = Sample(
            id=f"{split}/{number}",
            turns=(
                Turn(role="user", text=f"{IMAGE_MARKER}\n{settled['prompt'].format(question=question)}"),
                Turn(role="assistant", text=target),
            ),
            images=(f"{split}/{name}",),
            metadata={
                "answer": target, "answers": answers, "answer_type": field(record, "answer_type", str, where), "answerable": answerable,
            },  # fmt: skip
        )
        yield RawSample(split=split, sample=sample, image_sources=(images / name,))


def _answers(given: list[Any], where: str) -> list[str]:
    """The texts, of which some may be empty, but not all."""
    answers = []
    for number, record in enumerate(given):
        place = f"{where}: answers: number {number}"
        confidence = field(record, "answer_confidence", str, place)
        if confidence not in CONFIDENCES:
            raise InputError(f"{place}: answer_confidence: found '{confidence}', expected one of {', '.join(CONFIDENCES)}")
        if not isinstance(record.get("answer"), str):
            raise InputError(f"{place}: answer: found {record.get('answer')!r}, expected a text")
        answers.append(plain(record["answer"]))
    if not any(answers):
        raise InputError(f"{where}: answers: found {len(answers)} without a text, expected ten with one at least")
    return answers
