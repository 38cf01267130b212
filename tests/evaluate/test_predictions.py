"""Files of ScienceQA answers: a published one with a known score, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vltrain.errors import InputError
from vltrain.programs.evaluate import main
from vltrain.evaluate.predictions import read_predictions, score_predictions

ROOT = Path(__file__).resolve().parents[2]
MINI = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", ROOT / "../shared/data")) / "scienceqa_mini"
needs_sample_data = pytest.mark.skipif(not MINI.is_dir(), reason=f"no sample data at {MINI} (set VLTRAIN_SAMPLE_DATA)")

PROBLEM = {"question": "q", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None, "subject": "natural science", "grade": "grade2"}


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
    words = ["--predictions", str(MINI / "predictions_llava13b_v0.json"), "--data", str(MINI), "--split", "test", "--json", str(out)]
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
        '{"id": "2", "prediction": "The answer is B.", "correct": false}\n{"id": "1", "prediction": "The answer is B."}\n',
    ],
)
def test_three_formats_score_the_same(tmp_path, data, content):
    path = write(tmp_path / ("answers.jsonl" if isinstance(content, str) else "answers.json"), content)
    report = score_predictions(path, data, "test")
    assert [(answer.id, answer.correct, answer.answer) for answer in report.answers] == [("1", True, "B"), ("2", False, "A")]
    assert report.columns["IMG"].total == 1


@pytest.mark.parametrize(
    ("answers", "split", "parts"),
    [
        ({"1": "x"}, "test", ["has no answer to 1 question(s) of split 'test' (2)"]),
        ({"1": "x", "2": "x", "3": "x"}, "test", ["answers unknown 1 question(s)", "(3)"]),
        ({"1": "x", "2": 5}, "test", ["'2'", "found 5", "expected a text"]),
        ([1], "test", ["a JSON object"]),
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
        ('{"id": "1"}\n', "line 1: prediction"),
        ('{"id": "1", "prediction": "x"}\n{"id": "1", "prediction": "y"}\n', "line 2: a second answer to '1'"),
        ('{"id": "1", "prediction": "x"}\nnonsense\n', "line 2: not JSON"),
    ):
        with pytest.raises(InputError, match=part):
            read_predictions(write(tmp_path / "answers.jsonl", content))
    with pytest.raises(InputError, match="absent.json: cannot be read"):
        read_predictions(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--predictions", "a.json"], "needs --data"),
        (["--predictions", "a.json", "--dta", "b"], "--dta does not go with --predictions, did you mean 'data'"),
        (["run", "--predictions", "a.json", "--data", "b"], "'run' beside --predictions"),
        (["--predictions", "absent.json", "--data", "absent"], "absent"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_one_line(capsys, words, part):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and part in captured.err and captured.err.count("\n") == 1
