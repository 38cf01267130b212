"""What a scorer is, and the report that comes of one.

A scorer is two plain functions over an answered sample: `judge` (is this text right, and could an answer be found in it
at all?) and `columns` (which columns of the table the sample counts in; columns may overlap). Everything else is
counting. Where a text is not right or wrong but more or less like another, `judge` says how much, from 0 to 1, and the
scorer names the mean of that.

Where that depends on all other samples (CIDEr weighs words by how rare they are among them), or a figure is of all
answers together and no mean (BLEU), a scorer has `judge_all` in `judge`'s stead.

What a scorer needs of a sample it declares in `needs`, so that a sample that can't be scored is refused before anything
is answered, and a training run before its first step (`vltrain.evaluate.ready`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vltrain.errors import InputError

Metadata = Mapping[str, Any]


class Verdict(NamedTuple):
    """`correct`: true or false, or a degree from 0 to 1; `expected`: the right answer as a text; `failed`: no answer
    could be found in the prediction, which counts as wrong."""

    correct: bool | float
    failed: bool
    expected: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a scorer may know of a sample. `where` (file, id) is named in the errors that missing facts raise."""

    id: str
    reference: str
    """The text of the last assistant turn."""
    metadata: Metadata
    has_image: bool
    where: str


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`verdicts`: one for each answer, in order; `figures`: by name, of all answers together."""

    verdicts: list[Verdict]
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """`judge` or `judge_all`: see the module; `judge_all` gets (prediction, question) pairs.

    `needs`: raises InputError naming file, id and key for a question that lacks what the scorer reads, or contradicts
    itself: whose own reference it would not call right. `require_installed`: raises InputError where a package is
    missing. `fewest`: questions it takes at least.
    `column_order`: the columns that are always shown, first; others follow in alphabetical order. `measure`: the mean's
    name.
    """

    judge: Callable[[str, Question], Verdict] | None = None
    judge_all: Callable[[Sequence[tuple[str, Question]]], Judgement] | None = None
    columns: Callable[[Question], tuple[str, ...]]
    column_order: tuple[str, ...] = ()
    measure: str = "accuracy"
    needs: Callable[[Question], None]
    require_installed: Callable[[], object] = lambda: None
    fewest: int = 1

    def __post_init__(self) -> None:
        assert (self.judge is None) != (self.judge_all is None), "a scorer judges answers one by one or all together"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answered question, as a line of `predictions.jsonl`."""

    id: str
    prompt: str
    prediction: str
    answer: str
    correct: bool | float
    failed: bool


@dataclass
class Tally:
    """Right answers (or the sum of their degrees) of how many."""

    correct: int | float = 0
    total: int = 0

    def add(self, correct: bool | float) -> None:
        self.correct += correct
        self.total += 1

    @property
    def mean(self) -> float | None:
        """None where there was no question."""
        return self.correct / self.total if self.total else None


@dataclass(frozen=True)
class Remark:
    """How many questions something befell that the figures do not say by themselves, and a line on it."""

    count: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of an evaluation."""

    scorer: str
    overall: Tally
    failed: int
    columns: dict[str, Tally]
    answers: tuple[Answer, ...]
    measure: str = "accuracy"
    figures: dict[str, float] = field(default_factory=dict)
    """Further figures, of all answers together."""
    missing: int = 0
    """Questions without an answer, which are left out of everything above."""
    told: dict[str, str] = field(default_factory=dict)
    """How a file of answers was read."""
    remarks: dict[str, Remark] = field(default_factory=dict)
    """By name: answers that were cut, references that cannot be spelled."""

    @property
    def mean(self) -> float:
        """Of the measure: the share of right answers, or the mean of their degrees; 0 where there was no question."""
        return self.overall.mean or 0.0

    def headline(self) -> str:
        """The one line to remember: `accuracy=0.9012 (9673 questions) failed=3`, and the further figures."""
        figures = "".join(f" {name}={value:.4f}" for name, value in self.figures.items())
        missing = f" missing={self.missing}" if self.missing else ""
        return f"{self.measure}={self.mean:.4f} ({self.overall.total} questions) failed={self.failed}{figures}{missing}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the answers; the mean stands under its own name."""
        columns = {name: {self.measure: tally.mean, **asdict(tally)} for name, tally in self.columns.items()}
        counts = {
            self.measure: self.mean,
            "correct": self.overall.correct,
            "total": self.overall.total,
            "failed": self.failed,
        }
        told = {
            **({"missing": self.missing} if self.missing else {}),
            **self.told,
            **{name: remark.count for name, remark in self.remarks.items()},
        }
        return {"scorer": self.scorer, "measure": self.measure, **counts, **self.figures, **told, "columns": columns}

    def lines(self) -> list[str]:
        """A line for each remark on any question."""
        return [remark.text for remark in self.remarks.values() if remark.count]

    def to_markdown(self) -> str:
        """A table of the columns: accuracy in per cent, and how many questions that is of."""
        names = list(self.columns)
        shares = ["–" if tally.mean is None else f"{100 * tally.mean:.2f}" for tally in self.columns.values()]
        totals = [str(tally.total) for tally in self.columns.values()]
        widths = [max(map(len, cells)) for cells in zip(names, shares, totals)]
        lines = [["", *names], ["%", *shares], ["of", *totals]]
        rows = [
            "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, [2, *widths])) + " |" for line in lines
        ]
        rule = "|" + "|".join("-" * (width + 1) + ":" for width in [2, *widths]) + "|"
        return "\n".join([rows[0], rule, *rows[1:]])


def fact(question: Question, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """What the question's metadata says under `key`. Raises InputError naming file, id and key if it is missing or of
    another type."""
    value = question.metadata.get(key)
    if key not in question.metadata or not isinstance(value, kind) or isinstance(value, bool):
        found = repr(value) if key in question.metadata else "nothing"
        raise InputError(f"{question.where}: {key}: found {found}, expected {expected}")
    return value


def score(name: str, scorer: Scorer, answered: Iterable[tuple[Question, str, str]]) -> Report:
    """Judges (question, prompt, prediction) triples in the given order."""
    overall, failed = Tally(), 0
    columns = {column: Tally() for column in scorer.column_order}
    answers: list[Answer] = []
    answered = list(answered)
    judged = _judge(scorer, [(prediction, question) for question, _, prediction in answered])
    for (question, prompt, prediction), verdict in zip(answered, judged.verdicts, strict=True):
        overall.add(verdict.correct)
        failed += verdict.failed
        for column in scorer.columns(question):
            columns.setdefault(column, Tally()).add(verdict.correct)
        told = {"prompt": prompt, "prediction": prediction, "answer": verdict.expected}
        answers.append(Answer(id=question.id, **told, correct=verdict.correct, failed=verdict.failed))
    found = sorted(columns.keys() - set(scorer.column_order))
    ordered = {column: columns[column] for column in (*scorer.column_order, *found)}
    columns = {**ordered, "Average": overall}
    return Report(
        scorer=name,
        overall=overall,
        failed=failed,
        columns=columns,
        answers=tuple(answers),
        measure=scorer.measure,
        figures=judged.figures,
    )


def _judge(scorer: Scorer, answered: list[tuple[str, Question]]) -> Judgement:
    if scorer.judge_all is not None:
        return scorer.judge_all(answered)
    assert scorer.judge is not None
    return Judgement(verdicts=[scorer.judge(prediction, question) for prediction, question in answered], figures={})
