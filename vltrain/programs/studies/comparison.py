"""Which rows of a table differ from one of them: tested over seeds, and over the questions that both answered.

The test over seeds (Student's, paired) asks whether other seeds would say the same; the one over questions (McNemar's,
of several seeds its generalisation, see `significance.sign_flip`) whether other questions would, of these very runs.
Both are corrected by Holm for as many comparisons as there are: with all other rows, or, where the row that is compared
with was chosen for being the best, for those of all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.strict_json import field, is_object, read_lines, shown
from vltrain.programs.studies.significance import Spread, holm, paired_t, sign_flip, spread_of

LEVEL = 0.05
Seed = int | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a run. `value`: its figure, a share; `answers`: by question, right or wrong or a degree from 0 to 1;
    None where they are not kept."""

    measure: str
    value: float
    answers: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row beside another, over the seeds that both have. p: two-sided, None where there is no test; `..._corrected`:
    by Holm. `untested`: why there is none over questions."""

    row: str
    seeds: int
    difference: Spread
    p_by_seed: float | None
    p_by_question: float | None
    questions: int
    untested: str | None
    p_by_seed_corrected: float | None = None
    p_by_question_corrected: float | None = None

    @property
    def differs(self) -> str:
        """By which tests, at the level of 5%."""
        tests = (("seed", self.p_by_seed_corrected), ("question", self.p_by_question_corrected))
        return " and ".join(name for name, p in tests if p is not None and p < LEVEL) or "no"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`against`: the row; `best`: it was chosen for its figure; `family`: comparisons that p is corrected for."""

    against: str
    best: bool
    family: int
    rows: tuple[Compared, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows = [{**asdict(one), "differs": one.differs} for one in self.rows]
        return {"against": self.against, "best": self.best, "family": self.family, "rows": rows}

    def to_table(self) -> tuple[str, list[list[str]]]:
        """What the table is of, and its lines, the header first; differences in points."""
        several = any(one.seeds > 1 for one in self.rows)
        titles = ["row", "difference", *(["± 95%", "seeds", "p by seed"] if several else []), "p by question"]
        lines = [[*titles, "questions", "differs by"]]
        for one in self.rows:
            seeds = [_points(one.difference.half_width, sign=""), str(one.seeds), _chance(one.p_by_seed_corrected)]
            by_question = [one.untested or _chance(one.p_by_question_corrected), str(one.questions or "–")]
            difference = _points(one.difference.mean, sign="+")
            lines.append([one.row, difference, *(seeds if several else []), *by_question, one.differs])
        chosen = ", the best (p counts all pairs)" if self.best else ""
        alone = "" if several else "; one run each: another seed may say otherwise"
        family = "" if self.family == 1 else f"; p corrected for {self.family} comparisons (Holm)"
        told = f"Against {self.against}{chosen}, in points{family}{alone}:"
        return told, lines


def compare(runs: Mapping[str, Mapping[Seed, Run]], against: str, *, best: bool = False) -> Comparison | None:
    """Every row with figures against one of them.

    Args:
        runs: by row and seed, those that are done.
        best: in the place of `against`, the row with the highest mean among those of its measure.

    Returns: None where there is nothing to compare.
    """
    done = {row: by_seed for row, by_seed in runs.items() if by_seed}
    if best and done:
        against = best_of(done, against)
    if against not in done or len(done) < 2:
        return None
    pairs = itertools.combinations(done, 2) if best else ((row, against) for row in done if row != against)
    turned = [(second, first) if first == against else (first, second) for first, second in pairs]
    compared = {pair: one for pair in turned if (one := _pair(pair[0], done[pair[0]], done[pair[1]])) is not None}
    by_seed = holm([one.p_by_seed for one in compared.values()])
    by_question = holm([one.p_by_question for one in compared.values()])
    rows = tuple(
        replace(one, p_by_seed_corrected=seed, p_by_question_corrected=question)
        for ((_, second), one), seed, question in zip(compared.items(), by_seed, by_question)
        if second == against
    )
    return Comparison(against=against, best=best, family=len(compared), rows=rows) if rows else None


def best_of(done: Mapping[str, Mapping[Seed, Run]], like: str) -> str:
    """The row with the highest mean, among those with the measure of the row `like`, or of the first that is done."""
    measures = {row: next(iter(by_seed.values())).measure for row, by_seed in done.items()}
    measure = measures.get(like, next(iter(measures.values())))
    means = {row: spread_of([run.value for run in by_seed.values()]).mean for row, by_seed in done.items()}
    return max((row for row in done if measures[row] == measure), key=lambda row: means[row])


def _pair(row: str, first: Mapping[Seed, Run], second: Mapping[Seed, Run]) -> Compared | None:
    """None for rows without a seed in common, or of different measures."""
    shared = [seed for seed in first if seed in second and first[seed].measure == second[seed].measure]
    if not shared:
        return None
    differences = [first[seed].value - second[seed].value for seed in shared]
    summed, untested = _by_question([(first[seed].answers, second[seed].answers) for seed in shared])
    return Compared(
        row=row,
        seeds=len(shared),
        difference=spread_of(differences),
        p_by_seed=paired_t(differences),
        p_by_question=None if untested else sign_flip(summed),
        questions=len(summed),
        untested=untested,
    )


def _by_question(
    answers: Sequence[tuple[Mapping[str, float] | None, Mapping[str, float] | None]],
) -> tuple[list[float], str | None]:
    """The differences of each question, summed over seeds; or why there are none."""
    kept = [(first, second) for first, second in answers if first is not None and second is not None]
    if len(kept) < len(answers):
        return [], "no predictions"
    asked = kept[0][0].keys()
    if any(one.keys() != asked for pair in kept for one in pair):
        return [], "other questions"
    return [sum(first[name] - second[name] for first, second in kept) for name in asked], None


def read_answers(predictions: Path) -> dict[str, float] | None:
    """How right each answer of a run's `predictions.jsonl` is, by id; None where the file is not there. Raises
    InputError for a damaged one."""
    if not predictions.exists():
        return None
    answers: dict[str, float] = {}
    for where, record in read_lines(predictions, "a run's answers"):
        correct = record.get("correct") if is_object(record) else None
        if not isinstance(correct, (bool, int, float)) or not 0 <= correct <= 1:
            raise InputError(f"{where}: correct: found {shown(correct)}, expected true, false or a degree from 0 to 1")
        answers[field(record, "id", str, where)] = float(correct)
    return answers


def _points(value: float | None, *, sign: str) -> str:
    return "–" if value is None else f"{100 * value:{sign}.2f}"


def _chance(p: float | None) -> str:
    return "–" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"
