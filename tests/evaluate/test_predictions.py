"""Files of answers: a published one with a known score, the formats of other projects, and every way in which a file
can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vltrain.errors import InputError
from vltrain.evaluate.predictions import choice_of, read_predictions, score_predictions
from vltrain.programs.evaluate import main

ROOT = Path(__file__).resolve().parents[2]
MINI = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", ROOT / "../shared/data")) / "scienceqa_mini"
needs_sample_data = pytest.mark.skipif(not MINI.is_dir(), reason=f"no sample data at {MINI} (set VLTRAIN_SAMPLE_DATA)")

PROBLEM = {
    "question": "q",
    "choices": ["a", "b"],
    "answer": 1,
    "hint": "",
    "image": None,
    "subject": "natural science",
    "grade": "grade2",
}


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "problems.json", {"1": PROBLEM, "2": {**PROBLEM, "image": "image.png", "answer": 0}, "3": PROBLEM})
    write(folder / "pid_splits.json", {"test": ["1", "2"], "train": ["3"]})
    return folder


@needs_sample_data
def test_the_published_answers_score_37_of_50(tmp_path, capsys):
    out = tmp_path / "figures.json"
    words = [
        "--predictions",
        str(MINI / "predictions_llava13b_v0.json"),
        "--data",
        str(MINI),
        "--split",
        "test",
        "--json",
        str(out),
    ]
    assert main(words) == 0
    figures = json.loads(out.read_text())
    assert (figures["correct"], figures["total"], figures["failed"], figures["accuracy"]) == (37, 50, 0, 0.74)
    counts = {name: (column["correct"], column["total"]) for name, column in figures["columns"].items()}
    problems = json.loads((MINI / "problems.json").read_text())
    test = [problems[pid] for pid in json.loads((MINI / "pid_splits.json").read_text())["test"]]
    assert counts["NAT"][1] + counts["SOC"][1] + counts["LAN"][1] == 50 == counts["G1-6"][1] + counts["G7-12"][1]
    assert counts["NAT"][0] + counts["SOC"][0] + counts["LAN"][0] == 37 == counts["G1-6"][0] + counts["G7-12"][0]
    assert counts["IMG"][1] == sum(problem["image"] is not None for problem in test) == 24
    assert counts["TXT"][1] == sum(problem["hint"] != "" for problem in test)
    assert counts["NO"][1] == sum(problem["hint"] == "" and problem["image"] is None for problem in test)
    assert counts["Average"] == (37, 50)
    assert capsys.readouterr().out.splitlines()[-1] == "accuracy=0.7400 (50 questions) failed=0"


@pytest.mark.parametrize(
    "content",
    [
        {"1": "The answer is B.", "2": "The answer is B."},
        {"acc": 50.0, "correct": 1, "results": {"1": 1}, "outputs": {"1": "The answer is B.", "2": "The answer is B."}},
        '{"id": "2", "prediction": "The answer is B.", "correct": false}\n{"id": "1", "prediction": "The answer '
        'is B."}\n',
    ],
)
def test_three_formats_score_the_same(tmp_path, data, content):
    path = write(tmp_path / ("answers.jsonl" if isinstance(content, str) else "answers.json"), content)
    report = score_predictions(path, data, "test")
    assert [(answer.id, answer.correct, answer.answer) for answer in report.answers] == [
        ("1", True, "B"),
        ("2", False, "A"),
    ]
    assert report.columns["IMG"].total == 1


@pytest.mark.parametrize(
    ("answers", "split", "parts"),
    [
        ({"1": "x"}, "test", ["has no answer to 1 question(s) of split 'test' (2)"]),
        ({"1": "x", "2": "x", "3": "x"}, "test", ["answers unknown 1 question(s)", "(3)"]),
        ({"1": "x", "2": 5}, "test", ["'2'", "found 5", "expected a text"]),
        ([1], "test", ["[0]: found 1, expected an object"]),
        ("{", "test", ["not JSON"]),
        ('{"1": "x", "1": "y"}', "test", ["'1' a second time"]),
        ({"1": "x", "2": "x"}, "tset", ["no split 'tset'", "did you mean 'test'"]),
    ],
)
def test_a_wrong_file_of_answers_is_named(tmp_path, data, answers, split, parts):
    path = write(tmp_path / "answers.json", answers)
    with pytest.raises(InputError) as caught:
        score_predictions(path, data, split)
    for part in [*parts, str(path) if split == "test" else "pid_splits.json"]:
        assert part in str(caught.value)


@pytest.mark.parametrize("key", [*PROBLEM])
def test_a_problem_without_a_field_names_file_pid_and_key(tmp_path, data, key):
    broken = {name: value for name, value in PROBLEM.items() if name != key}
    write(data / "problems.json", {"1": PROBLEM, "2": broken})
    answers = write(tmp_path / "answers.json", {"1": "x", "2": "x"})
    with pytest.raises(InputError, match=f"problems.json: problem '2': {key}: found nothing"):
        score_predictions(answers, data, "test")


def test_a_split_that_lists_an_absent_problem_is_an_error(tmp_path, data):
    write(data / "problems.json", {"1": PROBLEM})
    with pytest.raises(InputError, match="problem '2': missing"):
        score_predictions(write(tmp_path / "answers.json", {"1": "x", "2": "x"}), data, "test")


def test_lines_of_answers_name_their_number(tmp_path):
    for content, part in (
        ('{"id": "1"}\n', "jsonl:1: prediction"),
        ('{"id": "1", "prediction": "x"}\n{"id": "1", "prediction": "y"}\n', "jsonl:2: a second answer to '1'"),
        ('{"id": "1", "prediction": "x"}\nnonsense\n', "jsonl:2:1: not JSON"),
    ):
        with pytest.raises(InputError, match=part):
            read_predictions(write(tmp_path / "answers.jsonl", content))
    with pytest.raises(InputError, match="absent.json: cannot be read"):
        read_predictions(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--predictions", "a.json"], "needs --data"),
        (["--predictions", "a.json", "--dta", "b"], "--dta cannot be combined with --predictions, did you mean 'data'"),
        (["run", "--predictions", "a.json", "--data", "b"], "'run' beside --predictions"),
        (["--predictions", "absent.json", "--data", "absent"], "absent"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_one_line(capsys, words, part):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and part in captured.err and captured.err.count("\n") == 1


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# Of questions 1 (right: B) and 2 (right: A): B and A, in the words of each project.
OF_OTHERS = {
    "llava.jsonl": lines(
        {"question_id": 1, "prompt": "p", "text": "B", "answer_id": "x", "model_id": "m", "metadata": {}},
        {"question_id": "2", "text": "A. a"},
    ),
    "chameleon.jsonl": lines(
        {"pid": "1", "example": PROBLEM, "prediction": "B ", "true_false": True},
        {"pid": "2", "prediction": "a", "true_false": True},
    ),
    "chameleon.json": {"results": {"1": {"prediction": "b"}, "2": {"prediction": "a"}}, "acc": 1.0},
    "mmcot.json": {
        "num_fail": 0,
        "scores": {},
        "preds": ["The answer is (B)", "The answer is (A)."],
        "labels": ["The answer is (B).", "The answer is (A)."],
    },
    "vqa.json": [{"question_id": 2, "answer": "(a)"}, {"question_id": 1, "answer": "Answer: B"}],
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_files_of_other_projects(tmp_path, data, name, capsys):
    path = write(tmp_path / name, OF_OTHERS[name])
    needs_letters = name.startswith(("llava", "vqa"))
    report = score_predictions(path, data, "test", letters=needs_letters)
    assert report.overall.correct == 2 and report.failed == 0 and report.told["read as"].endswith("2 of 2")
    if needs_letters:
        assert score_predictions(path, data, "test").failed == 2, "letters are read only where that is asked for"
    assert main(["--predictions", str(path), "--data", str(data), *(["--letters"] if needs_letters else [])]) == 0
    said = capsys.readouterr().out
    assert (
        "read as: " in said and "answers: " in said and said.rstrip().endswith("accuracy=1.0000 (2 questions) failed=0")
    )


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", 1),
        ("(b)", 1),
        (" B. ", 1),
        ("b)", 1),
        ("B. a cat", 1),
        ("(c) a dog", 2),
        ("The answer is B.", 1),
        ("so the answer is (A)", 0),
        ("Answer: C", 2),
        ("a cat", None),
        ("The answer is a cat", None),
        ("E", None),
        ("", None),
        ("Be careful", None),
        ("The answer is Bird", None),
        ("AB", None),
        ("The answer is A. The answer is B.", 0),
    ],
)
def test_letters(text, choice):
    assert choice_of(text, 4) == choice


SAMPLES = [
    {
        "id": str(number),
        "images": [],
        "turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": text}],
        "metadata": metadata,
    }
    for number, (text, metadata) in enumerate(
        [
            (
                "(a) red",
                {
                    "answers": ["(a) red"] * 10,
                    "captions": ["a red dog"],
                    "candidates": ["(a) red", "(b) blue"],
                    "answer": 0,
                    "question_type": "choose_txt",
                },
            ),
            (
                "(b) blue",
                {
                    "answers": ["(b) blue"] * 10,
                    "captions": ["a blue cat"],
                    "candidates": ["(a) red", "(b) blue"],
                    "answer": 1,
                    "question_type": "choose_txt",
                },
            ),
        ]
    )
]


@pytest.mark.parametrize(
    ("scorer", "texts", "letters"),
    [
        ("exact", ["(A) red.", "x"], []),
        ("vqa", ["(a) red", "x"], []),
        ("rouge", ["red", "x"], []),
        ("iconqa", ["(a) red", "x"], []),
        ("iconqa", ["A", "a"], ["--letters"]),
        ("caption", ["a red dog", "x"], []),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_every_scorer_judges_files_of_answers_to_samples(tmp_path, capsys, scorer, texts, letters, folder):
    if scorer == "caption":
        pytest.importorskip("nltk")
    samples = write(tmp_path / "test.jsonl", lines(*SAMPLES))
    answers = write(tmp_path / "answers.json", {str(number): text for number, text in enumerate(texts)})
    out = tmp_path / "figures.json"
    place = ["--data", str(tmp_path), "--split", "test"] if folder else ["--data", str(samples)]
    assert main(["--predictions", str(answers), *place, "--eval.scorer", scorer, "--json", str(out), *letters]) == 0
    figures = json.loads(out.read_text())
    assert (
        figures["scorer"] == scorer
        and figures["total"] == 2
        and figures["correct"] > 0
        and (scorer == "caption" or figures["correct"] <= 1)
    )
    assert (
        capsys.readouterr()
        .out.rstrip()
        .rpartition("\n")[2]
        .startswith(f"{figures['measure']}={figures[figures['measure']]:.4f} (2 questions)")
    )


def test_a_part_of_a_split_is_scored_where_that_is_asked_for_and_told(tmp_path, data, capsys):
    answers = write(tmp_path / "answers.json", {"1": "The answer is B."})
    words = ["--predictions", str(answers), "--data", str(data), "--json", str(tmp_path / "out.json")]
    assert main(words) == 2 and "--allow-missing" in capsys.readouterr().err
    assert main([*words, "--allow-missing"]) == 0
    said = capsys.readouterr().out
    assert "left out: 1 question(s)" in said and said.rstrip().endswith(
        "accuracy=1.0000 (1 questions) failed=0 missing=1"
    )
    assert json.loads((tmp_path / "out.json").read_text())["missing"] == 1
    for other in ({"1": "x", "9": "x"}, {}):  # of another split, or of none
        assert (
            main(["--predictions", str(write(tmp_path / "other.json", other)), "--data", str(data), "--allow-missing"])
            == 2
        )


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.json", {"preds": ["x"]}, "preds: found 1 texts, expected 2"),
        ("a.json", {"preds": ["x", None]}, "preds[1]: found null"),
        ("a.json", {"preds": ["x", "y"], "labels": ["The answer is (A).", "The answer is (B)."]}, "another order"),
        ("a.json", {"acc": 79.9, "correct": 3390, "wrong": 851, "count": 4241, "args": {}}, "found figures only"),
        ("a.json", {"results": {"1": 1, "2": 0}}, "found no texts"),
        ("a.json", {"outputs": {"1": None}}, "outputs: '1': found null"),
        ("a.jsonl", lines({"question_id": None, "text": "x"}), "question_id: found null, expected an id"),
        ("a.jsonl", lines({"question_id": True, "text": "x"}), "question_id: found true, expected an id"),
        (
            "a.jsonl",
            lines({"question_id": 1, "text": "x"}, {"question_id": "1", "text": "y"}),
            "a second answer to '1'",
        ),
        ("a.jsonl", lines({"question_id": 1, "text": ["x"]}), 'text: found ["x"], expected a text'),
        ("a.jsonl", lines({"name": 1}), "found the keys name"),
    ],
)
def test_wrong_files_of_other_projects(tmp_path, data, name, content, part):
    with pytest.raises(InputError) as caught:
        score_predictions(write(tmp_path / name, content), data, "test")
    assert part in str(caught.value)


def test_texts_in_the_order_of_a_split_are_refused_where_there_is_none(tmp_path):
    with pytest.raises(InputError, match="only a split's order could tell apart"):
        read_predictions(write(tmp_path / "a.json", {"preds": ["x"]}))


def test_what_the_questions_cannot_be_judged_by_is_refused(tmp_path, data):
    samples, answers = write(tmp_path / "test.jsonl", lines(*SAMPLES)), write(tmp_path / "a.json", {"0": "x", "1": "x"})
    plain = write(tmp_path / "plain.jsonl", lines(*({**one, "metadata": {}} for one in SAMPLES)))
    for arguments, part in (
        ((answers, samples, "test"), "--eval.scorer"),
        ((answers, samples, "test", "exakt"), "did you mean 'exact'"),
        ((answers, tmp_path, "tset", "exact"), "did you mean 'test'"),
        ((answers, data, "test", "rouge"), "judged by scienceqa"),
        ((answers, tmp_path / "data" / "none", "test", "exact"), "no such file"),
    ):
        with pytest.raises(InputError, match=part):
            score_predictions(*arguments)
    with pytest.raises(InputError, match="--letters: has no effect"):
        score_predictions(answers, plain, "test", "exact", letters=True)
