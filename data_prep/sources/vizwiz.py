"""VizWiz-VQA (Gurari et al., 2018): photos by blind people, their questions, ten answers each, from the official files.

    train.json, val.json   [{image, question, answers: [{answer, answer_confidence}] * 10, answer_type, answerable}],
                           also in Annotations/
    train/, val/           the images, also in Images/

test.json has no answers, so nothing can be learned or scored from it: it is left out, and said so. The official val is
what figures are reported on, so it must not choose the model as well. The splits are therefore

    train, val             train.json; `val`, on which a run is evaluated while it trains, is held out by image
                           (`data_prep.sources.splits`)
    test                   val.json, whole: figures are comparable with those that others report on the official val
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading import is_there
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.prompts import check_template, plain
from data_prep.sources.raw import RawSample, image_name
from data_prep.sources.splits import FRACTIONS, drawn
from vltrain.errors import InputError
from vltrain.files.strict_json import expect, field, read_json, shown
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

FILES = ("train", "val")
DEFAULTS = {
    "prompt": "Question: {question} Short answer:",
    "target": "majority",
    "unanswerable": "keep",
    "val_fraction": 0.05,
}
CONFIDENCES = ("yes", "maybe", "no")


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads train.json and val.json, those of them that are there, as the splits above.

    Args:
        input: the folder of the files above.
        options: `prompt` with the place {question}; `target`, which of the ten answers is learned: the `majority` (of
            equals the first) or the `first`, as the paper's code does; `unanswerable`: `keep`, or `drop` to leave
            questions out that are marked so, in train only; `val_fraction` (0.05), the share of train.json that is held
            out as `val`: in [0, 1), 0 for none.

    Raises:
        InputError: nothing there, or a missing or malformed field: named with file, number, image and key.
    """
    resolved = resolve_options("vizwiz", options, DEFAULTS, FRACTIONS)
    check_template("vizwiz", "prompt", resolved["prompt"], ("question",))
    choose("vizwiz", "target", resolved["target"], ("majority", "first"))
    choose("vizwiz", "unanswerable", resolved["unanswerable"], ("keep", "drop"))
    if input is None:
        raise InputError("source 'vizwiz' needs --input, the folder of train.json, val.json and the images")
    files = {split: _first(input, f"{split}.json", "Annotations") for split in (*FILES, "test")}
    if not any(files[name] for name in FILES):
        raise InputError(
            f"{input}: found neither {' nor '.join(f'{name}.json' for name in FILES)} in it or in its Annotations"
        )
    if files["train"] is not None:
        questions = partial(
            _read_file, files["train"], "train", _first(input, "train", "Images") or input / "train", resolved
        )
        for raw in drawn("vizwiz", questions, resolved, options):
            if raw.split != "train" or resolved["unanswerable"] == "keep" or raw.sample.metadata["answerable"]:
                yield raw
    if files["val"] is not None:
        for raw in _read_file(files["val"], "val", _first(input, "val", "Images") or input / "val", resolved):
            yield replace(raw, split="test")
    if files["test"] is not None:
        print(f"{files['test']}: left out, it has no answers; the split 'test' is val.json")


def _first(input: Path, name: str, folder: str) -> Path | None:
    return next((path for path in (input / name, input / folder / name) if is_there(path)), None)


def _read_file(path: Path, part: str, images: Path, resolved: Mapping[str, Any]) -> Iterator[RawSample]:
    """The questions of an official file, train.json or val.json (`part`)."""
    records = expect(read_json(path), list, str(path))
    for number, record in enumerate(records):
        name = image_name(record, "image", f"{path}: question {number}")
        where = f"{path}: question {number} ('{name}')"
        answers = _answers(field(record, "answers", list, where), where)
        answerable = field(record, "answerable", int, where)
        if answerable not in (0, 1):
            raise InputError(f"{where}: answerable: found {answerable}, expected 0 or 1")
        question = escape_markers(plain(field(record, "question", str, where)))
        texts = [answer for answer in answers if answer]
        target = texts[0] if resolved["target"] == "first" else Counter(texts).most_common(1)[0][0]
        sample = Sample(
            id=f"{part}/{number}",
            turns=(
                Turn(role="user", text=f"{IMAGE_MARKER}\n{resolved['prompt'].format(question=question)}"),
                Turn(role="assistant", text=escape_markers(target)),
            ),
            images=(f"{part}/{name}",),
            metadata={
                "answer": target,
                "answers": answers,
                "answer_type": field(record, "answer_type", str, where),
                "answerable": answerable,
            },  # fmt: skip
        )
        yield RawSample(split=part, sample=sample, image_sources=(images / name,))


def _answers(given: list[Any], where: str) -> list[str]:
    """The texts, of which some may be empty, but not all."""
    answers: list[str] = []
    for number, record in enumerate(given):
        place = f"{where}: answers[{number}]"
        confidence = field(record, "answer_confidence", str, place)
        if confidence not in CONFIDENCES:
            raise InputError(
                f"{place}: answer_confidence: found '{confidence}', expected one of {', '.join(CONFIDENCES)}"
            )
        if type(record.get("answer")) is not str:
            raise InputError(f"{place}: answer: found {shown(record.get('answer'))}, expected a text")
        answers.append(plain(record["answer"]))
    if not any(answers):
        raise InputError(f"{where}: answers: found {len(answers)} without a text, expected ten with one at least")
    return answers
