"""VQA accuracy against values computed by hand, and the official normalisation step by step."""

from __future__ import annotations

import itertools

import pytest

from vltrain.errors import InputError
from vltrain.evaluate.report import score_samples
from vltrain.evaluate.scorers import vqa
from vltrain.evaluate.scorers.scoring import Question
from vltrain.schema import Sample, Turn


@pytest.mark.parametrize(
    ("matches", "expected"),
    # m of ten match: m of the ten subsets have m - 1 of them, the others all m
    [(0, 0.0), (1, 0.9 * 1 / 3), (2, 0.2 * 1 / 3 + 0.8 * 2 / 3), (3, 0.3 * 2 / 3 + 0.7), (4, 1.0), (10, 1.0)],
)
def test_accuracy_by_hand(matches, expected):
    answers = ["yes"] * matches + [f"other {number}" for number in range(10 - matches)]
    assert vqa.accuracy("yes", answers) == pytest.approx(expected, abs=1e-12)


def test_accuracy_is_the_mean_over_the_leave_one_out_subsets():
    answers = ["a dog", "dog", "Dog.", "the dog", "cat", "cat", "two dogs", "2 dogs", "unanswerable", "brown"]
    for prediction in ("dog", "cats", "cat", "Two dogs!", "none"):
        said = vqa.normalise(prediction)
        subsets = itertools.combinations([vqa.normalise(answer) for answer in answers], 9)
        assert vqa.accuracy(prediction, answers) == pytest.approx(
            sum(min(1, subset.count(said) / 3) for subset in subsets) / 10
        )
    assert vqa.accuracy("dog", answers) == 1.0 and vqa.accuracy("2 Dogs", answers) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  The Dog\n", "dog"),
        ("a man and an apple", "man and apple"),
        ("none", "0"),
        ("ten Dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Couldntve", "couldntve"),  # two apostrophes missing: not in the official table
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("let's", "let's"),
        ("coca-cola", "coca cola"),  # a mark amid letters becomes a space,
        ("coca- cola", "coca cola"),  # one that touches a space goes,
        ("yes/no, maybe/not", "yes no maybe not"),  # each mark for itself
        ("1,000", "1000"),  # with a comma between digits all marks go,
        ("1,000-2,000", "10002000"),  # these too
        ("3.5", "3.5"),
        ("$3.5.", "$3.5"),
        ("U.S.A.", "usa"),
        ("what?!", "what"),
        ("", ""),
    ],
)
def test_normalisation(text, normalised):
    assert vqa.normalise(text) == normalised


def test_the_table_of_contractions_is_the_official_one():
    # All but "let's" and "she's", which stay as they are, and those with a capital I, which no lower-cased word is.
    assert len(vqa.CONTRACTIONS) == 114
    official = {
        "aint": "ain't",
        "cant": "can't",
        "couldve": "could've",
        "couldn'tve": "couldn't've",
        "hed": "he'd",
        "hed've": "he'd've",
        "he'dve": "he'd've",
        "im": None,
        "ive": None,
        "maam": "ma'am",
        "notve": "not've",
        "oclock": "o'clock",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "shed": None,
        "shed've": "she'd've",
        "well": None,
        "were": None,
        "ill": None,
        "its": None,
        "theyre": "they're",
        "twas": "'twas",
        "yall": "y'all",
        "y'allll": "y'all'll",
        "yall'll": "y'all'll",
        "youve": "you've",
    }
    assert {word: vqa.CONTRACTIONS.get(word) for word in official} == official


def vizwiz(name: str, answers: list[str], kind: str = "other") -> Sample:
    turns = (Turn(role="user", text="q"), Turn(role="assistant", text=answers[0]))
    return Sample(id=name, turns=turns, metadata={"answers": answers, "answer_type": kind})


def test_a_report_of_degrees():
    samples = [
        vizwiz("1", ["red"] * 2 + ["blue"] * 8),
        vizwiz("2", ["yes"] * 10, "yes/no"),
        vizwiz("3", ["7"] * 10, "number"),
    ]
    report = score_samples("vqa", samples, ["Red", "yes.", " "], "val.jsonl")
    assert report.headline() == f"accuracy={1.6 / 3:.4f} (3 questions) failed=1"
    columns = {name: (pytest.approx(tally.correct), tally.total) for name, tally in report.columns.items()}
    assert columns == {"number": (0, 1), "other": (0.6, 1), "yes/no": (1, 1), "Average": (1.6, 3)}
    assert report.to_json()["accuracy"] == pytest.approx(1.6 / 3)


@pytest.mark.parametrize("metadata", [{}, {"answers": "red"}, {"answers": ["red"]}, {"answers": ["red", 5]}])
def test_answers_that_do_not_fit_name_file_id_and_key(metadata):
    with pytest.raises(InputError, match="file: sample '1': answers: found"):
        vqa.judge("red", Question(id="1", reference="red", metadata=metadata, has_image=True, where="file: sample '1'"))
