"""Which rows differ: planted differences, found by seeds, by questions, by both or by neither."""

import json
import math

import numpy as np
import pytest

from vltrain.errors import InputError
from vltrain.programs.studies.comparison import Run, compare, read_answers


def runs(*seeds: list[int], measure: str = "accuracy") -> dict[int | None, Run]:
    """A row whose seeds answered questions 0, 1, ... right (1) or wrong (0)."""
    answered = [{str(number): float(one) for number, one in enumerate(right)} for right in seeds]
    return {
        seed: Run(measure=measure, value=sum(answers.values()) / len(answers), answers=answers)
        for seed, answers in enumerate(answered)
    }


def right(count: int, of: int = 100) -> list[int]:
    return [1] * count + [0] * (of - count)


def test_rows_beside_the_first_are_as_by_hand():
    table = {
        "first": runs(right(50), right(52), right(54)),
        "same": runs(right(50), right(52), right(54)),
        "better": runs(right(70), right(73), right(73)),
        "one more": runs(right(51), right(53), right(55)),
    }
    found = compare(table, "first")
    assert (found.against, found.family, [one.row for one in found.rows]) == (
        "first",
        3,
        ["same", "better", "one more"],
    )
    same, better, one_more = found.rows
    assert (same.p_by_seed, same.p_by_question, same.differs) == (1.0, 1.0, "no")
    # differences 0.20, 0.21, 0.19: t = 0.2 / (0.01 / sqrt 3) with 2 degrees of freedom, p = 1 - t / sqrt(t^2 + 2)
    t = 0.2 / (0.01 / math.sqrt(3))
    assert better.p_by_seed == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert better.difference.mean == pytest.approx(0.20) and better.difference.half_width == pytest.approx(
        0.02484, abs=1e-5
    )
    assert better.p_by_seed_corrected == pytest.approx(2 * better.p_by_seed), "one more has no test over seeds"
    assert better.differs == "seed and question" and better.questions == 100
    assert better.p_by_question < 1e-4 and better.p_by_question_corrected == pytest.approx(3 * better.p_by_question)
    assert one_more.p_by_seed is None, "differences without any spread are no proof"
    assert one_more.differs == "no" and one_more.p_by_question == pytest.approx(2 / 2**3)


def test_against_the_best_all_pairs_are_corrected_for():
    table = {
        "low": runs(right(40), right(42)),
        "high": runs(right(80), right(79)),
        "middle": runs(right(60), right(61)),
    }
    found = compare(table, "low", best=True)
    assert (found.against, found.best, found.family) == ("high", True, 3)
    assert {one.row: round(one.difference.mean, 3) for one in found.rows} == {"low": -0.385, "middle": -0.19}
    alone = {one.row: one for one in compare(table, "high").rows}
    for one in found.rows:
        assert one.p_by_question == alone[one.row].p_by_question
        assert one.p_by_question_corrected >= alone[one.row].p_by_question_corrected


def test_one_run_each_is_tested_over_questions_alone():
    table = {"a": {None: runs(right(90, 200))[0]}, "b": {None: runs(right(150, 200))[0]}}
    title, lines = compare(table, "a").to_table()
    assert "one run each: another seed may say otherwise" in title
    assert lines == [
        ["row", "difference", "p by question", "questions", "differs by"],
        ["b", "+30.00", "<0.0001", "200", "question"],
    ]


def test_what_cannot_be_tested_says_why():
    whole = runs(right(5, 10), right(6, 10))
    silent = {seed: Run(measure="accuracy", value=0.4 + seed / 7, answers=None) for seed in (0, 1)}
    other = runs(right(5, 12), right(6, 12))
    table = {"a": whole, "silent": silent, "other": other, "rouge": runs(right(1), measure="rougeL"), "none": {}}
    found = compare(table, "a")
    assert {one.row: one.untested for one in found.rows} == {"silent": "no predictions", "other": "other questions"}
    assert all(one.p_by_question is None and one.p_by_seed is not None for one in found.rows)
    assert compare({"a": whole, "b": {}}, "a") is None and compare({"a": {}, "b": whole}, "a") is None
    assert compare({"a": whole, "b": {9: whole[0]}}, "a") is None, "no seed in common"


def test_rows_that_are_the_same_seldom_differ():
    """400 tables of four equal rows, 4 seeds, 40 questions: a false one in at most 5% of them by each test."""
    generator, wrong = np.random.default_rng(3), {"seed": 0, "question": 0}
    for _ in range(400):
        table = {name: runs(*generator.integers(0, 2, size=(4, 40)).tolist()) for name in "abcd"}
        told = " ".join(one.differs for one in compare(table, "a").rows)
        for test in wrong:
            wrong[test] += test in told
    assert all(count <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95) for count in wrong.values()), wrong


def test_answers_are_read_back_and_damage_is_named(tmp_path):
    path = tmp_path / "predictions.jsonl"
    assert read_answers(path) is None
    path.write_text(
        "".join(json.dumps({"id": f"q{n}", "correct": value}) + "\n" for n, value in enumerate((True, 0.3, 0)))
    )
    assert read_answers(path) == {"q0": 1.0, "q1": 0.3, "q2": 0.0}
    for line in ('{"id": "q"}', '{"id": "q", "correct": "yes"}', '{"id": "q", "correct": 2}', '{"correct": true}', "{"):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match="predictions.jsonl"):
            read_answers(path)
