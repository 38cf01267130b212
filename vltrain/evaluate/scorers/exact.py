"""Scorer `exact`: the answer, word for word, up to case, surrounding space and one closing full stop."""

from __future__ import annotations

from vltrain.errors import InputError
from vltrain.evaluate.scorers.scoring import Question, Scorer, Verdict, fact


def normalise(text: str) -> str:
    """What two answers are compared by."""
    return text.strip().casefold().removesuffix(".").rstrip()


def judge(prediction: str, question: Question) -> Verdict:
    """An empty prediction is one in which no answer could be found."""
    return Verdict(
        normalise(prediction) == normalise(question.reference), not prediction.strip(), question.reference.strip()
    )


def columns(question: Question) -> tuple[str, ...]:
    """The sample's `kind`, where its metadata has one."""
    kind = question.metadata.get("kind")
    return () if kind is None else (fact(question, "kind", str, "a text"),)


def needs(question: Question) -> None:
    """Raises InputError for an answer that an empty prediction would equal."""
    if not normalise(question.reference):
        raise InputError(
            f"{question.where}: found the answer {question.reference!r}, expected more than a full stop: an "
            "empty prediction would equal it"
        )


SCORER = Scorer(judge=judge, columns=columns, needs=needs)
