"""Scorer of IconQA's three question types, and of ScienceQA's questions whose answers are "(a) text"."""

from __future__ import annotations

import pytest

from vltrain.errors import InputError
from vltrain.evaluate.report import score_samples
from vltrain.evaluate.scorers import iconqa, scienceqa
from vltrain.evaluate.scorers.scoring import Question, Verdict
from vltrain.schema import Sample, Turn

CHOICES = {
    "question_type": "choose_txt",
    "candidates": ["(a) cat", "(b) dog"],
    "answer": 1,
    "grade": "grade1",
    "skills": ["scene", "counting"],
}


def question(reference: str = "", **metadata) -> Question:
    return Question(id="7", reference=reference, metadata=metadata, has_image=True, where="file: sample '7'")


@pytest.mark.parametrize(
    ("prediction", "verdict"),
    [
        ("(b) dog", Verdict(True, False, "(b) dog")),
        (" (B) Dog. ", Verdict(True, False, "(b) dog")),
        ("(a) cat", Verdict(False, False, "(b) dog")),
        ("(b) cat", Verdict(False, True, "(b) dog")),  # the right letter with another text is no candidate
        ("dog", Verdict(False, True, "(b) dog")),
        ("", Verdict(False, True, "(b) dog")),
    ],
)
def test_choices_are_judged_by_exact_match(prediction, verdict):
    assert iconqa.judge(prediction, question(**CHOICES)) == verdict
    science = {"candidates": CHOICES["candidates"], "choices": ["cat", "dog"], "answer": 1}
    assert scienceqa.judge(prediction, question(**science)) == verdict


def test_scienceqa_sentences_are_judged_as_before_where_candidates_are_sentences():
    facts = {"candidates": ["The answer is A.", "The answer is B."], "choices": ["x", "y"], "answer": 1}
    assert scienceqa.judge("The answer is B. BECAUSE: of it", question(**facts)) == Verdict(True, False, "B")


def test_blanks_are_judged_by_their_text():
    blank = {"question_type": "fill_in_blank", "candidates": [], "answer": "7,364"}
    assert iconqa.judge(" 7,364.", question("7,364", **blank)) == Verdict(True, False, "7,364")
    assert iconqa.judge("7364", question("7,364", **blank)) == Verdict(False, False, "7,364")


def test_columns_by_type_grade_and_each_skill():
    assert iconqa.columns(question(**CHOICES)) == ("choose_txt", "grade1", "scene", "counting")
    assert iconqa.columns(question(question_type="fill_in_blank")) == ("fill_in_blank",)


def test_the_table():
    turns = (Turn(role="user", text="q"), Turn(role="assistant", text="(b) dog"))
    blank = {"question_type": "fill_in_blank", "answer": "(b) dog", "grade": "prek", "skills": ["counting"]}
    samples = [
        Sample(id=str(number), turns=turns, metadata=facts) for number, facts in enumerate((CHOICES, CHOICES, blank))
    ]
    report = score_samples("iconqa", samples, ["(b) dog", "(a) cat", "(b) dog"], "x")
    counts = {name: (tally.correct, tally.total) for name, tally in report.columns.items()}
    assert counts == {
        "choose_txt": (1, 2),
        "choose_img": (0, 0),
        "fill_in_blank": (1, 1),
        "counting": (2, 3),
        "grade1": (1, 2),
        "prek": (1, 1),
        "scene": (1, 2),
        "Average": (2, 3),
    }


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"question_type": "choose_text"}, "question_type: unknown 'choose_text', did you mean 'choose_txt'"),
        ({"question_type": None}, "question_type: found None"),
        ({"candidates": []}, "candidates: found"),
        ({"candidates": None}, "candidates: found None"),
        ({"answer": 2}, "answer: found 2, expected 0 to 1"),
        ({"answer": "b"}, "answer: found 'b'"),
        ({"grade": 1}, "grade: found 1"),
        ({"skills": "counting"}, "skills: found 'counting'"),
    ],
)
def test_facts_that_do_not_fit_name_file_id_and_key(changes, part):
    with pytest.raises(InputError) as caught:
        iconqa.judge("x", question(**{**CHOICES, **changes}))
        iconqa.columns(question(**{**CHOICES, **changes}))
    assert str(caught.value).startswith(f"file: sample '7': {part}")
