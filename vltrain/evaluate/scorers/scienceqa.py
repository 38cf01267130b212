"""Scorer `scienceqa`: the letter after "The answer is", and the nine columns of ScienceQA's tables.

The first `The answer is X.` of a prediction counts. Without one the question counts as wrong and is reported as failed
(the reference implementations draw a random choice, which makes scores irreproducible and a point or so higher).
Questions whose candidate answers are no such sentences ("(a) text") are judged by exact match with the right one
(`vltrain.evaluate.scorers.choices`). Columns as in Lu et al. 2022 (https://arxiv.org/abs/2209.09513): by subject; by
context (TXT: there is a hint; IMG: there is an image; both may be; NO:
neither); by grade; and the average over all questions.
"""

from __future__ import annotations

import re

from vltrain.errors import InputError
from vltrain.evaluate.scorers.choices import judge_choice, needs_choices
from vltrain.evaluate.scorers.scoring import Question, Scorer, Verdict, fact
from vltrain.files.strict_json import is_list, texts

_ANSWER = re.compile(r"The answer is ([A-Z])\.")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LAST_LOWER_GRADE = 6
_NUM_GRADES = 12


def _is_listed(question: Question) -> bool:
    """Whether its candidate answers are other texts than "The answer is A."."""
    candidates = question.metadata.get("candidates")
    return is_list(candidates) and bool(candidates) and not _ANSWER.match(str(candidates[0]))


def _letter_of(question: Question) -> str:
    choices = fact(question, "choices", list, "a list of texts")
    texts(question.metadata, "choices", question.where)
    answer = fact(question, "answer", int, "the number of the right choice")
    if not 0 <= answer < len(choices) <= 26:
        raise InputError(
            f"{question.where}: answer: found {answer}, expected a number below the {len(choices)} choices (26 at most)"
        )
    return chr(ord("A") + answer)


def needs(question: Question) -> None:
    """Choices and the number of the right one, which the sample's answer says too. Raises InputError as `judge` and
    `columns`."""
    if _is_listed(question):
        needs_choices(question)
    elif not judge(question.reference, question).correct:
        found = (
            f"the answer {question.reference!r:.80} does not say 'The answer is {_letter_of(question)}.', as "
            "choices and answer do"
        )
        raise InputError(
            f"{question.where}: {found}; expected them to agree (eval.scorer rouge scores rationales alone)"
        )


def judge(prediction: str, question: Question) -> Verdict:
    """Raises InputError if the question's metadata lacks `choices` or `answer`."""
    if _is_listed(question):
        return judge_choice(prediction, question)
    expected = _letter_of(question)
    found = _ANSWER.search(prediction)
    return Verdict(found is not None and found[1] == expected, found is None, expected)


def columns(question: Question) -> tuple[str, ...]:
    """Raises InputError if the question's metadata lacks `subject`, `hint` or `grade`."""
    subject = fact(question, "subject", str, f"one of {', '.join(_SUBJECTS)}")
    hint = fact(question, "hint", str, "a text")
    grade = fact(question, "grade", str, "grade1 to grade12")
    if subject not in _SUBJECTS:
        raise InputError(f"{question.where}: subject: found '{subject}', expected one of {', '.join(_SUBJECTS)}")
    number = grade.removeprefix("grade")
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= _NUM_GRADES):
        raise InputError(f"{question.where}: grade: found '{grade}', expected grade1 to grade12")
    context = [name for name, given in (("TXT", hint.strip()), ("IMG", question.has_image)) if given] or ["NO"]
    return _SUBJECTS[subject], *context, "G1-6" if int(number) <= _LAST_LOWER_GRADE else "G7-12"


SCORER = Scorer(
    judge=judge, columns=columns, column_order=("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"), needs=needs
)
