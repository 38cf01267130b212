"""Scores a file of answers, ours or anybody's (`vltrain.evaluate.prediction_files`), by any scorer, without a model.

The questions are ScienceQA's, as published, or those of a file of samples. A score is only comparable if every question
of the split was answered, so missing ids are an error and not a smaller denominator, unless that is asked for, and
told. Ids that the split does not have are an error, since they mean that the wrong split was named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Set
from dataclasses import dataclass, replace
from pathlib import Path

from vltrain.errors import InputError, nearest
from vltrain.evaluate.prediction_files import CHAMELEON, MMCOT, PredictionFile, read_prediction_file
from vltrain.evaluate.report import find_scorer
from vltrain.evaluate.samples import read_samples
from vltrain.evaluate.scorers.choices import candidates_of
from vltrain.evaluate.scorers.exact import normalise
from vltrain.evaluate.scorers.question import prompt_text, question_of
from vltrain.evaluate.scorers.scoring import Question, Report, score
from vltrain.files.strict_json import expect, field, id_text, read_object, texts

MAX_NAMED = 3
SCIENCEQA = "scienceqa"
_BARE = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
_IN_FRONT = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[.:)])\s")
_IN_SENTENCE = re.compile(r"[Aa]nswer(?: is|:) (?:\(([A-Za-z])\)|([A-Z])(?![A-Za-z]))")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, and what was asked, for people to read."""

    question: Question
    prompt: str


def score_predictions(
    predictions: Path,
    data: Path,
    split: str,
    scorer: str | None = None,
    *,
    letters: bool = False,
    allow_missing: bool = False,
) -> Report:
    """The report on a file of answers.

    Args:
        predictions: see `vltrain.evaluate.prediction_files`.
        data: ScienceQA's folder, with problems.json and pid_splits.json; a folder of prepared samples; or a file of
            samples.
        split: a name in pid_splits.json, or of the folder's SPLIT.jsonl.
        scorer: None: scienceqa, for ScienceQA's folder.
        letters: an answer may be a letter, see `choice_of`; how many were read so is told.
        allow_missing: leave questions out that have no answer; how many is told.

    Raises: InputError for unreadable files, missing fields (file, id and key are named), and ids that do not match the
    split.
    """
    asked = _questions(data, split, scorer)
    scorer = scorer or SCIENCEQA
    judge = find_scorer(scorer)
    file = read_prediction_file(predictions, [one.question.id for one in asked])
    known = {one.question.id for one in asked}
    missing = known - file.texts.keys()
    for problem, ids in (
        ("has no answer to", set[str]() if allow_missing else missing),
        ("answers unknown", file.texts.keys() - known),
    ):
        if ids:
            found = f"{problem} {len(ids)} question(s) of split '{split}' ({name_some(ids)})"
            hint = "; --allow-missing scores the others" if ids is missing else ""
            raise InputError(f"{predictions}: {found}; expected its {len(known)} ids exactly{hint}")
    answered = [one for one in asked if one.question.id in file.texts]
    if not answered:
        raise InputError(f"{predictions}: answers none of the {len(known)} question(s) of split '{split}'")
    _require_same_order(file, answered)
    said = {one.question.id: file.texts[one.question.id] for one in answered}
    told = {"answers": file.kind}
    if letters and not any({"choices", "candidates"} & one.question.metadata.keys() for one in answered):
        raise InputError("--letters: has no effect: these questions have no choices; leave it out")
    if letters or file.kind in (CHAMELEON, MMCOT):
        chosen = {
            one.question.id: _choice(file.texts[one.question.id], one.question, file.kind, letters) for one in answered
        }
        said |= {name: text for name, text in chosen.items() if text is not None}
        what = "choices' texts" if file.kind == CHAMELEON and not letters else "letters"
        told["read as"] = f"{what}: {sum(text is not None for text in chosen.values())} of {len(answered)}"
    report = score(scorer, judge, ((one.question, one.prompt, said[one.question.id]) for one in answered))
    return replace(report, missing=len(missing), told=told)


def _questions(data: Path, split: str, scorer: str | None) -> list[Asked]:
    if data.is_dir() and (data / "problems.json").exists():
        if scorer not in (None, SCIENCEQA):
            raise InputError(
                f"--eval.scorer {scorer}: ScienceQA's own files are judged by {SCIENCEQA}; prepare them, and "
                "give the samples, for another"
            )
        return [Asked(question=question, prompt=question.reference) for question in read_questions(data, split)]
    file = data / f"{split}.jsonl" if data.is_dir() else data
    if data.is_dir() and not file.exists():
        found = sorted(path.stem for path in data.glob("*.jsonl"))
        hint = nearest(split, found) if found else "found neither problems.json of ScienceQA nor prepared samples"
        raise InputError(f"{data}: no samples of split '{split}', {hint}")
    if scorer is None:
        raise InputError(f"{file}: these questions may be judged in several ways: name one by --eval.scorer")
    asked: list[Asked] = []
    needs = find_scorer(scorer).needs
    for sample in read_samples(file):
        question = question_of(sample, str(file))
        needs(question)  # as where a model answers: one figure is not of other questions than the other
        asked.append(Asked(question=question, prompt=prompt_text(sample)))
    return asked


def read_questions(data: Path, split: str) -> list[Question]:
    """The questions of a ScienceQA split in its own order. `reference` holds the question's text."""
    splits = read_object(data / "pid_splits.json")
    if split not in splits:
        raise InputError(f"{data / 'pid_splits.json'}: no split '{split}', {nearest(split, splits)}")
    problems = read_object(data / "problems.json")
    questions: list[Question] = []
    seen: set[str] = set()
    listed = expect(splits[split], list, f"{data / 'pid_splits.json'}: {split}")
    for pid in (id_text(one, f"{data / 'pid_splits.json'}: {split}[{number}]") for number, one in enumerate(listed)):
        where = f"{data / 'problems.json'}: problem '{pid}'"
        if pid in seen:
            raise InputError(
                f"{data / 'pid_splits.json'}: {split}: names problem '{pid}' twice, which would count twice"
            )
        seen.add(pid)
        if pid not in problems:
            raise InputError(f"{where}: missing, though pid_splits.json lists it in '{split}'")
        text = field(problems[pid], "question", str, where)
        problem = problems[pid]
        if "image" not in problem:
            raise InputError(f"{where}: image: found nothing, expected a file name or null")
        has_image = problem["image"] not in (None, "") and bool(expect(problem["image"], str, f"{where}: image"))
        questions.append(Question(id=pid, reference=text, metadata=problem, has_image=has_image, where=where))
    return questions


def read_predictions(path: Path) -> dict[str, str]:
    """{id: predicted text} of a file that names ids. Raises InputError as `read_prediction_file`."""
    return read_prediction_file(path).texts


def choice_of(text: str, num_choices: int) -> int | None:
    """The number of the choice that an answer names by its letter, or None: `B`, `(b)`, `B.`; `B. text`, `(b) text`;
    else the first "answer is B", "answer is (b)" or "Answer: B" in it.

    A single small letter counts by itself or in brackets only: in a sentence, "a" is an article.
    """
    said = text.strip()
    found = _BARE.fullmatch(said) or _IN_FRONT.match(said) or _IN_SENTENCE.search(said)
    if found is None:
        return None
    number = ord(next(letter for letter in found.groups() if letter).upper()) - ord("A")
    return number if number < num_choices else None


def _choice(text: str, question: Question, kind: str, letters: bool) -> str | None:
    """The answer as the scorer expects it, if the file's text names a choice in another way."""
    candidates = question.metadata.get("candidates")
    if candidates is not None:
        candidates, _ = candidates_of(question)
    choices = texts(question.metadata, "choices", question.where) if "choices" in question.metadata else candidates
    if not choices:
        return None
    number = choice_of(text, len(choices)) if letters or kind == MMCOT else None
    if number is None and kind == CHAMELEON:
        said = [normalise(choice) for choice in choices]
        number = said.index(normalise(text)) if normalise(text) in said else None
    if number is None:
        return None
    return candidates[number] if candidates else f"The answer is {chr(ord('A') + number)}."


def _require_same_order(file: PredictionFile, asked: list[Asked]) -> None:
    """A file without ids tells the right answers, too: where they are letters, they must be these questions' own.
    Raises InputError."""
    for one in asked:
        label, right = file.labels.get(one.question.id, ""), one.question.metadata.get("answer")
        if type(right) is not int or (found := _IN_SENTENCE.search(label)) is None:
            continue
        letter = chr(ord("A") + right)
        if (found[1] or found[2]).upper() != letter:
            told = f"the file's label of question '{one.question.id}' is {label!r:.60}, its right answer is {letter}"
            raise InputError(f"{file.path}: {told}: the file is of another split, or in another order")


def name_some(ids: Set[str] | Collection[str]) -> str:
    """The first of `ids`, for an error."""
    first = sorted(ids, key=lambda pid: (len(pid), pid))[:MAX_NAMED]
    return ", ".join(first) + (", ..." if len(ids) > MAX_NAMED else "")
