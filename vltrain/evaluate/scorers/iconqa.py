"""Scorer `iconqa`: accuracy on IconQA's three question types, in columns by type, grade and skill.

choose_txt and choose_img: exact match with the right candidate (`vltrain.evaluate.scorers.choices`), whether generated
or ranked. fill_in_blank:
the answer's text, word for word, up to case, space and a closing full stop. Columns as in Lu et al. 2021
(https://arxiv.org/abs/2110.13214), where a question counts in each of its skills; grades and skills appear as far as
the data tells them.
"""

from __future__ import annotations

from typing import Any

from vltrain.errors import InputError, nearest
from vltrain.evaluate.scorers import exact
from vltrain.evaluate.scorers.choices import judge_choice, needs_choices
from vltrain.evaluate.scorers.scoring import Question, Scorer, Verdict, fact

CHOICE_TYPES = ("choose_txt", "choose_img")
TYPES = (*CHOICE_TYPES, "fill_in_blank")


def _type_of(question: Question) -> str:
    name = fact(question, "question_type", str, f"one of {', '.join(TYPES)}")
    if name not in TYPES:
        raise InputError(f"{question.where}: question_type: unknown '{name}', {nearest(name, TYPES)}")
    return name


def judge(prediction: str, question: Question) -> Verdict:
    """Raises InputError naming file, id and key for an unknown question type, no candidates, or an answer that is none
    of them."""
    if _type_of(question) in CHOICE_TYPES:
        return judge_choice(prediction, question)
    return exact.judge(prediction, question)


def columns(question: Question) -> tuple[str, ...]:
    """Raises InputError for metadata of other types than text and lists of texts."""
    grade = (fact(question, "grade", str, "a grade"),) if "grade" in question.metadata else ()
    skills: list[Any] = fact(question, "skills", list, "a list of skills") if "skills" in question.metadata else []
    if not all(isinstance(skill, str) for skill in skills):
        raise InputError(f"{question.where}: skills: found {skills!r:.80}, expected a list of texts")
    return _type_of(question), *grade, *dict.fromkeys(skills)


def needs(question: Question) -> None:
    """A question type, and of one with choices candidates of which the answer is one. Raises InputError as `judge` and
    `columns`, and for metadata that gives a text another answer than the sample does."""
    if _type_of(question) in CHOICE_TYPES:
        needs_choices(question)
        return
    exact.needs(question)
    told = question.metadata.get("answer")
    if isinstance(told, str) and exact.normalise(told) != exact.normalise(question.reference):
        raise InputError(
            f"{question.where}: answer: found {told!r:.80} in the metadata and {question.reference!r:.80} as "
            "the last turn, expected them to agree"
        )


SCORER = Scorer(judge=judge, columns=columns, column_order=TYPES, needs=needs)
