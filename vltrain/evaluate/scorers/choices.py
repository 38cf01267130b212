"""Multiple choice: the candidate answers of a question, and whether a text is the right one of them.

`metadata["candidates"]` holds the texts that an answer can be, in the order of the choices, and `metadata["answer"]`
the number of the right one. A prediction counts if it is that text, up to case, surrounding space and a closing full
stop; one that is none of the candidates is reported as failed. Ranking (`vltrain.evaluate.answering.ranking`) never
fails.
"""

from __future__ import annotations

from vltrain.errors import InputError
from vltrain.evaluate.scorers.exact import normalise
from vltrain.evaluate.scorers.scoring import Question, Verdict, fact
from vltrain.files.strict_json import is_list


def candidates_of(question: Question) -> tuple[list[str], int]:
    """The candidates and the number of the right one.

    Raises: InputError naming file, id and key for fewer than two, for empty ones, for two that a prediction could not
    tell apart, or an answer
        that is none of them.
    """
    expected = "the texts that an answer can be (prepare the data again, with a source that has choices)"
    candidates = fact(question, "candidates", list, expected)
    if len(candidates) < 2 or not all(isinstance(text, str) and text.strip() for text in candidates):
        raise InputError(
            f"{question.where}: candidates: found {candidates!r:.80}, expected two or more texts that are not empty"
        )
    if len(set(map(normalise, candidates))) < len(candidates):
        raise InputError(f"{question.where}: candidates: found {candidates!r:.80}, expected different ones")
    choices = question.metadata.get("choices")
    if is_list(choices) and len(choices) != len(candidates):
        raise InputError(
            f"{question.where}: candidates: found {len(candidates)} of {len(choices)} choices, expected one for each"
        )
    answer = fact(question, "answer", int, "the number of the right candidate")
    if not 0 <= answer < len(candidates):
        raise InputError(
            f"{question.where}: answer: found {answer}, expected 0 to {len(candidates) - 1}, one of the candidates"
        )
    return candidates, answer


def needs_choices(question: Question) -> tuple[list[str], int]:
    """`candidates_of`. Raises InputError also where the sample's answer does not begin with the candidate that its
    metadata calls right."""
    candidates, answer = candidates_of(question)
    if not question.reference.startswith(candidates[answer]):
        found = (
            f"the answer {question.reference!r:.80} does not begin with its right candidate {candidates[answer]!r:.80}"
        )
        raise InputError(f"{question.where}: {found}; answer, candidates and the last turn must agree")
    return candidates, answer


def judge_choice(prediction: str, question: Question) -> Verdict:
    """Raises InputError as `candidates_of` does."""
    candidates, answer = candidates_of(question)
    said = normalise(prediction)
    return Verdict(said == normalise(candidates[answer]), said not in map(normalise, candidates), candidates[answer])
