"""Scorers and their tables, against cases small enough to count by hand."""

from __future__ import annotations

import json

import pytest

from vltrain.errors import InputError
from vltrain.evaluate.report import SCORERS, find_scorer, score_samples, write_report, write_whole
from vltrain.evaluate.scorers import exact, rouge, scienceqa
from vltrain.evaluate.scorers.scoring import Question, Verdict
from vltrain.schema import Sample, Turn


def question(reference: str = "", has_image: bool = False, **metadata) -> Question:
    return Question(id="7", reference=reference, metadata=metadata, has_image=has_image, where="file.json: problem '7'")


def science(**changes) -> Question:
    facts = {"choices": ["a", "b", "c"], "answer": 1, "subject": "natural science", "hint": "", "grade": "grade3"}
    return question(has_image=changes.pop("has_image", False), **{**facts, **changes})


@pytest.mark.parametrize(
    ("prediction", "reference", "correct"),
    [
        ("yes", "yes", True),
        (" Yes. ", "yes", True),
        ("YES", "yes.", True),
        ("yes .", "yes", True),
        ("yes yes", "yes", False),
        ("yes..", "yes", False),
        ("no", "yes", False),
        ("Straße", "STRASSE", True),
        ("a.b", "ab", False),
    ],
)
def test_exact_answers_are_compared_up_to_case_space_and_a_full_stop(prediction, reference, correct):
    assert exact.judge(prediction, question(reference)) == Verdict(correct, False, reference.strip())


@pytest.mark.parametrize(
    ("prediction", "reference", "f"),
    [
        ("the cat sat", "the cat sat", 1.0),
        (
            "the cats sat on it",
            "The cat sat on the mat.",
            8 / 11,
        ),  # the cat sat on: 4 of 5 and of 6 words; stemmed, lower-cased
        ("mat on sat cat the", "the cat sat on the mat", 4 / 11),  # order counts: two words in common, of 5 and of 6
        ("dog", "the cat", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, f):
    assert rouge.judge(prediction, question(reference)) == Verdict(pytest.approx(f), False, reference)


def test_a_report_of_degrees_calls_their_mean_by_its_name():
    asked = [
        Sample(id=str(number), turns=(Turn(role="user", text="q"), Turn(role="assistant", text="a b")))
        for number in range(3)
    ]
    report = score_samples("rouge", asked, ["a b", "a c", " "], "file")
    assert report.headline() == "rougeL=0.5000 (3 questions) failed=1"
    figures = report.to_json()
    assert (figures["measure"], figures["rougeL"], figures["correct"], figures["failed"]) == ("rougeL", 0.5, 1.5, 1)
    assert "accuracy" not in figures and figures["columns"]["Average"]["rougeL"] == 0.5


def test_rationales_of_scienceqa_have_its_columns():
    assert rouge.columns(science(hint="h")) == ("NAT", "TXT", "G1-6") and rouge.columns(question()) == ()


def test_an_empty_exact_answer_is_a_failure():
    assert exact.judge("  ", question("yes")) == Verdict(False, True, "yes")


@pytest.mark.parametrize(
    ("prediction", "verdict"),
    [
        ("The answer is B.", Verdict(True, False, "B")),
        ("The answer is B. BECAUSE: The answer is A.", Verdict(True, False, "B")),
        ("The answer is A. No: The answer is B.", Verdict(False, False, "B")),
        ("LECTURE ...\n The answer is B.", Verdict(True, False, "B")),
        ("The answer is Z.", Verdict(False, False, "B")),  # a letter beyond the choices
        ("The answer is Because.", Verdict(False, True, "B")),
        ("The answer is b.", Verdict(False, True, "B")),
        ("B", Verdict(False, True, "B")),
        ("", Verdict(False, True, "B")),
    ],
)
def test_the_first_letter_after_the_answer_is_counts(prediction, verdict):
    assert scienceqa.judge(prediction, science()) == verdict


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({}, ("NAT", "NO", "G1-6")),
        ({"hint": "look", "has_image": True}, ("NAT", "TXT", "IMG", "G1-6")),
        ({"hint": "look", "grade": "grade6"}, ("NAT", "TXT", "G1-6")),
        ({"hint": "  \n", "grade": "grade7"}, ("NAT", "NO", "G7-12")),
        ({"has_image": True, "grade": "grade12"}, ("NAT", "IMG", "G7-12")),
        ({"subject": "social science"}, ("SOC", "NO", "G1-6")),
        ({"subject": "language science"}, ("LAN", "NO", "G1-6")),
    ],
)
def test_the_columns_of_a_question(changes, columns):
    assert scienceqa.columns(science(**changes)) == columns


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"choices": "a"}, "choices: found 'a'"),
        ({"answer": "B"}, "answer: found 'B'"),
        ({"answer": True}, "answer: found True"),
        ({"answer": 3}, "answer: found 3"),
        ({"answer": -1}, "answer: found -1"),
        ({"subject": "maths"}, "subject: found 'maths'"),
        ({"grade": "grade13"}, "grade: found 'grade13'"),
        ({"grade": "third"}, "grade: found 'third'"),
        ({"hint": None}, "hint: found None"),
    ],
)
def test_facts_that_do_not_fit_name_file_id_and_key(changes, part):
    with pytest.raises(InputError) as caught:
        scienceqa.judge("", science(**changes))
        scienceqa.columns(science(**changes))
    assert str(caught.value).startswith(f"file.json: problem '7': {part}")


@pytest.mark.parametrize("key", ["choices", "answer", "subject", "hint", "grade"])
def test_missing_facts_name_file_id_and_key(key):
    facts = {name: value for name, value in science().metadata.items() if name != key}
    with pytest.raises(InputError, match=f"file.json: problem '7': {key}: found nothing"):
        scienceqa.judge("", question(**facts))
        scienceqa.columns(question(**facts))


def easy_samples() -> list[Sample]:
    turns = [("blue?", "yes", "colour"), ("red?", "no", "colour"), ("shape?", "circle", "shape"), ("odd?", "no", None)]
    return [
        Sample(
            id=str(number),
            turns=(Turn(role="user", text=asked), Turn(role="assistant", text=answer)),
            metadata={} if kind is None else {"kind": kind},
        )
        for number, (asked, answer, kind) in enumerate(turns)
    ]


def test_the_report_counts_overall_and_by_kind():
    report = score_samples("exact", easy_samples(), ["Yes.", "yes", "circle", ""], "samples.jsonl")
    assert (report.overall.correct, report.overall.total, report.failed) == (2, 4, 1)
    counts = {name: (tally.correct, tally.total) for name, tally in report.columns.items()}
    assert counts == {"colour": (1, 2), "shape": (1, 1), "Average": (2, 4)}
    assert report.headline() == "accuracy=0.5000 (4 questions) failed=1"
    assert [(answer.id, answer.prompt, answer.prediction, answer.answer, answer.correct) for answer in report.answers][
        :2
    ] == [
        ("0", "blue?", "Yes.", "yes", True),
        ("1", "red?", "yes", "no", False),
    ]


def test_the_table_shows_shares_totals_and_empty_columns():
    lines = SCORERS["scienceqa"]
    sample = Sample(
        id="1", turns=(Turn(role="user", text="q"), Turn(role="assistant", text="a")), metadata=dict(science().metadata)
    )
    report = score_samples("scienceqa", [sample, sample, sample], ["The answer is B.", "The answer is B.", "?"], "x")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.to_markdown().splitlines()]
    assert rows[0] == ["", *lines.column_order, "Average"]
    assert rows[2] == ["%", "66.67", "–", "–", "–", "–", "66.67", "66.67", "–", "66.67"]
    assert rows[3] == ["of", "3", "0", "0", "0", "0", "3", "3", "0", "3"]
    assert len({len(line) for line in report.to_markdown().splitlines()}) == 1
    figures = report.to_json()
    assert figures["columns"]["NAT"] == {"accuracy": 2 / 3, "correct": 2, "total": 3}
    assert figures["columns"]["SOC"] == {"accuracy": None, "correct": 0, "total": 0}
    assert (figures["accuracy"], figures["correct"], figures["total"], figures["failed"]) == (2 / 3, 2, 3, 1)


def test_an_unknown_scorer_names_the_nearest():
    with pytest.raises(InputError, match="'sciencqa', did you mean 'scienceqa'"):
        find_scorer("sciencqa")


def test_a_report_is_written_whole_and_again(tmp_path):
    for predictions in (["yes", "no", "circle", "no"], ["yes", "no", "square", "\u4f60"]):
        report = score_samples("exact", easy_samples(), predictions, "x")
        write_report(report, tmp_path / "eval" / "test", {"split": "test", "step": 3})
        lines = (tmp_path / "eval" / "test" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == predictions
        metrics = json.loads((tmp_path / "eval" / "test" / "metrics.json").read_text())
        assert (metrics["split"], metrics["step"], metrics["correct"]) == ("test", 3, report.overall.correct)
    assert sorted(path.name for path in (tmp_path / "eval" / "test").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
        "table.md",
    ]


def test_a_place_that_cannot_be_written_to_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/metrics.json: could not be written"):
        write_whole(tmp_path / "file" / "metrics.json", "{}")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(InputError, match="taken.json"):
        write_whole(tmp_path / "taken.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.json"]
