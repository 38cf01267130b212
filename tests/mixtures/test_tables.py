"""A table whose rows train on several sets: what is run, what is shown of each set, and what is compared."""

import json
from pathlib import Path

import pytest
import yaml

from tests.programs.test_ablate import Pretender, table  # noqa: F401
from vltrain.config.command_line import load_settings
from vltrain.config.mixture import sets_of
from vltrain.errors import InputError
from vltrain.programs.studies import ablate
from vltrain.programs.studies.ablate import main

FIGURES = {"red": ("accuracy", 0.5), "blue": ("CIDEr", 0.8)}


class Answering(Pretender):
    """Evaluations answer each set of the row that `vltrain evaluate` would: all but those of no scorer."""

    def __call__(self, program: Path, words: tuple[str, ...], ranks: int, log: Path) -> int:
        if program.stem != "evaluate":
            return super().__call__(program, words, ranks, log)
        self.commands.append([program.stem, *words[1:]])
        names = {"both": ("red", "blue"), "red": ("red",)}[log.parent.name]
        for name in names:
            measure, value = FIGURES[name]
            value += 0.25 * (log.parent.name == "red")
            place = log.parent / "eval" / name / "val"
            place.mkdir(parents=True)
            told = {"step": 7, "measure": measure, measure: value, "total": 8, "failed": 1, "columns": {}}
            (place / "metrics.json").write_text(json.dumps(told))
            lines = [json.dumps({"id": str(number), "correct": number < 8 * value}) for number in range(8)]
            (place / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        return 0


@pytest.fixture
def several(table) -> Path:  # noqa: F811
    """The table's two rows: one of two sets, one of the first of them."""
    base = yaml.safe_load((table.parent / "base.yaml").read_text())
    data = base["data"]
    own = {"source": data.pop("source"), "input": data.pop("input"), "options": data.pop("options")}
    data["mixture"] = {"red": {**own, "method": "generate", "max_new_tokens": 4}, "blue": own}
    (table.parent / "base.yaml").write_text(json.dumps(base))
    rows = {"both": {"train": {"max_steps": 9}}, "red": {"data": {"mixture": {"blue": None}}}}
    text = {"base": "base.yaml", "output": str(table.parent / "out"), "rows": rows}
    table.write_text(yaml.safe_dump({**text, "ablation": {"max_samples": 8, "split": "val"}}, sort_keys=False))
    return table


def test_each_set_is_a_column_and_compared_by_itself(several, monkeypatch, capsys):
    made = Answering()
    monkeypatch.setattr(ablate, "launch", made)
    assert main([str(several)]) == 0
    out = several.parent / "out"
    evaluated = [words for words in made.commands if words[0] == "evaluate"]
    assert evaluated == [["evaluate", "--split", "val", "--eval.max_samples", "8"]] * 2
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (out / "table.md").read_text().split("\n")
    ]
    titles = lines[0]
    assert titles[4:8] == ["mean of sets", "red", "blue CIDEr", "questions"]
    assert lines[2][4:9] == ["65.00", "50.00", "80.00", "16", "2"]
    assert lines[3][1] == "data.mixture blue null" and lines[3][4:8] == ["75.00", "75.00", "–", "8"]
    text = (out / "table.md").read_text()
    assert "red: Against both" in text and "blue: Against" not in text, "of one row alone there is nothing to compare"
    found = json.loads((out / "table.json").read_text())
    (compared,) = found["comparison_by_set"]["red"]["rows"]
    assert (compared["row"], compared["questions"]) == ("red", 8)
    assert compared["difference"]["mean"] == pytest.approx(0.25)
    assert found["rows"][0]["metrics"]["sets"]["blue"]["CIDEr"] == 0.8 and "comparison" not in found
    made.commands.clear()
    assert main([str(several)]) == 0 and made.commands == [], "finished rows are left alone"
    assert main([str(several), "--data.mixture.red.weight", "2"]) == 2
    assert "data.mixture was" in capsys.readouterr().err


def config_of(several: Path, *words: str):
    return load_settings(["--recipe", f"{several}#both", *words], program="test").config


def test_a_set_is_answered_its_own_way(several):
    sets = sets_of(config_of(several, "--eval.method", "rank"))
    assert (sets["red"].eval.method, sets["red"].eval.max_new_tokens) == ("generate", 4)
    assert (sets["blue"].eval.method, sets["blue"].eval.max_new_tokens) == ("rank", None)


def test_a_set_that_is_null_is_left_out(several):
    assert list(sets_of(config_of(several, "--data.mixture.red", "null"))) == ["blue"]
    assert list(sets_of(load_settings(["--recipe", f"{several}#red"], program="test").config)) == ["red"]
    with pytest.raises(InputError, match=r"data.mixture.green: found null, expected the set's keys"):
        config_of(several, "--data.mixture.green", "null")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("method", "rank"), "data.mixture.red.max_new_tokens: has no effect: its method rank"),
        (("scorer", "null"), "data.mixture.red.method: has no effect: the set has no scorer"),
        (("method", "guess"), "data.mixture.red.method: found 'guess', expected"),
        (("max_new_tokens", "0"), "data.mixture.red.max_new_tokens: found 0"),
    ],
)
def test_what_changes_no_answer_is_refused(several, words, says):
    name, value = words
    with pytest.raises(InputError, match=says):
        config_of(several, f"--data.mixture.red.{name}", value)
