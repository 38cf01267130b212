"""Tables with published figures and files of answers: Table 1's figures against the paper's text, files scored beside
trained rows, what is not here, and plans."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.programs.test_ablate import pretender, table  # noqa: F401
from tests.support.processes import ROOT
from vltrain.config.command_line import load_settings
from vltrain.config.recipe import read_table
from vltrain.programs.studies import ablate
from vltrain.programs.studies.ablate import main

RECIPES = ROOT / "launch" / "recipes"
PAPER = Path("/work/shared/seeds/001_71f4efd88a977959.txt")
IN_PAPER = {
    "Human": "human", "LaVIN-7B": "lavin_7b", "LaVIN-13B": "lavin_13b", "BLIP-2": "blip2",
    "InstructBLIP": "instructblip", "MM-CoT-Base": "mmcot_base", "MM-CoT-Large": "mmcot_large", "LLaVA": "llava",
    "Chameleon": "chameleon", "LLaMA-Adapter": "llama_adapter", "7B-lite-diht-BA(ours)": "mmt_7b",
}  # fmt: skip
TEST_QUESTIONS = {"NAT": 2252, "SOC": 889, "LAN": 1100}


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not here")
def test_table_1_is_the_papers():
    published = read_table(RECIPES / "table1.yaml").published
    text = PAPER.read_text().partition("Table 1: Accuracy")[2].partition("demonstrates competitive")[0]
    found = {}
    for line in text.splitlines():
        words = line.removeprefix("\\botrule").split()
        if words and words[0] in IN_PAPER and len(words) == 10:
            cells = zip(published.columns, words[1:])
            found[IN_PAPER[words[0]]] = {column: float(cell) for column, cell in cells if cell != "-"}
    assert found == published.figures and list(found) == list(published.figures)


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not here")
@pytest.mark.parametrize("name", ["table2", "table3"])
def test_tables_2_and_3_are_the_papers(name):
    read = read_table(RECIPES / f"{name}.yaml")
    assert list(read.published.figures) == list(read.rows)
    _, _, text = PAPER.read_text().partition(f"Table {name[-1]}: ")
    text = re.split(r"\n\n", text, maxsplit=1)[0]
    figures = [f"{row['Average']:.2f}" for row in read.published.figures.values()]
    assert [word for word in re.findall(r"\d\d\.\d\d$", text, re.MULTILINE)] == figures


def test_published_averages_are_those_of_their_subjects():
    """Of 4,241 test questions, as many of each subject as ScienceQA has."""
    for row, figures in read_table(RECIPES / "table1.yaml").published.figures.items():
        if "NAT" in figures:
            mean = sum(figures[name] * count for name, count in TEST_QUESTIONS.items()) / sum(TEST_QUESTIONS.values())
            assert figures["Average"] == pytest.approx(mean, abs=0.02), row


@pytest.fixture
def mixed(table) -> Path:  # noqa: F811
    """The table of two trained rows, with published figures and three files of answers to four questions."""
    folder = table.parent
    choices = {"choices": ["a", "b"], "subject": "natural science", "grade": "grade2", "topic": "physics"}
    problems = {
        str(number): {
            "question": f"{number}?", "answer": number % 2, "hint": "", "image": None if number % 2 else "image.png",
            "lecture": "", "solution": "", "category": "x", "skill": "y", "task": "closed choice", **choices,
        }
        for number in range(4)
    }  # fmt: skip
    (folder / "ScienceQA").mkdir()
    (folder / "ScienceQA" / "problems.json").write_text(json.dumps(problems))
    (folder / "ScienceQA" / "pid_splits.json").write_text(json.dumps({"val": ["0", "1", "2", "3"]}))
    (folder / "whole.json").write_text(json.dumps({"0": "A", "1": "(b)", "2": "The answer is B.", "3": "B"}))
    (folder / "short.json").write_text(json.dumps({"0": "A", "1": "B", "7": "A"}))
    table.write_text(
        table.read_text()
        + f"predictions:\n  data: {folder / 'ScienceQA'}\n  letters: true\n  files:\n"
        + "".join(f"    {name}: {folder / name}.json\n" for name in ("whole", "gone"))
        + "published:\n  source: A paper\n  rows:\n    gone: {Average: 88.4}\n"
        + "    whole: {NAT: 90.23, IMG: 87.5, Average: 88.4}\n"
        + "    small: {NAT: 50, Average: 40.126}\n    silu: {NAT: 1}\n"
    )
    return table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_files_of_answers_and_published_figures_stand_beside_the_rows(mixed, pretender, capsys, caplog):  # noqa: F811
    pretender.failing = {"silu/train_mmt"}
    assert main([str(mixed), "--ranks", "1"]) == 1, "silu failed; what is not here is no failure"
    out = mixed.parent / "out"
    text = (out / "table.md").read_text()
    lines = {cells(line)[0]: cells(line) for line in text.split("\n\n")[0].splitlines()}
    assert list(lines)[2:] == ["gone", "whole", "small", "silu"]
    assert lines["gone"][1:5] == [f"answers {mixed.parent / 'gone.json'}", "", "", "not here"]
    names, whole = lines["row"], lines["whole"]
    assert [whole[names.index(name)] for name in ("accuracy", "NAT", "IMG", "questions", "failed", "steps")] == [
        "75.00", "75.00", "50.00", "4", "0", ""
    ]  # fmt: skip
    title, published = text.split("\n\n")[1:3]
    assert title == "Published (A paper), in per cent, and one's own below:"
    assert [cells(line) for line in published.splitlines()[2:]] == [
        ["gone", "published", "88.40", "–", "–"], ["", "own: not here", "", "", ""],
        ["whole", "published", "88.40", "90.23", "87.50"], ["", "own", "75.00", "75.00", "50.00"],
        ["small", "published", "40.13", "50.00", "–"], ["", "own", "25.00", "50.00", "–"],
        ["silu", "published", "–", "1.00", "–"], ["", "own: failed", "", "", ""],
    ]  # fmt: skip
    assert (out / "whole" / "eval" / "val" / "predictions.jsonl").exists()
    assert json.loads((out / "table.json").read_text())["published"]["rows"]["whole"]["IMG"] == 87.5


def test_a_file_that_does_not_cover_the_questions_is_a_failed_row(mixed, pretender, caplog):  # noqa: F811
    mixed.write_text(mixed.read_text().replace("gone.json", "short.json"))
    assert main([str(mixed), "--ranks", "1", "--only", "gone"]) == 1
    assert not pretender.commands, "no other row is run"
    assert "row gone failed" in caplog.text and "has no answer to 2 question(s) of split 'val' (2, 3)" in caplog.text
    (mixed.parent / "short.json").write_text('{"0": "A", "1": "A", "2": "A", "3": "A", "7": "A"}')
    assert main([str(mixed), "--ranks", "1", "--only", "gone"]) == 1
    assert "answers unknown 1 question(s) of split 'val' (7)" in caplog.text
    (mixed.parent / "short.json").write_text('{"0": "A", "1": "B", "2": "A", "3": "B"}')
    assert main([str(mixed), "--ranks", "1", "--only", "gone"]) == 0, "a file is scored anew each time"


def test_a_row_without_its_weights_says_so(mixed, pretender, monkeypatch):  # noqa: F811
    own = load_settings(["--recipe", "llama2_7b_diht_scienceqa"], program="test").config
    sources = [source for source in (own.model.vision.source, own.model.llm.source) if not Path(source).exists()]
    assert ablate.absent_weights(own) == sources
    shipped = load_settings(["--recipe", "quickstart"], program="test").config
    assert shipped.model.llm.source.startswith("asset://") and ablate.absent_weights(shipped) == []
    monkeypatch.setattr(ablate, "absent_weights", lambda config: ["x"] if config.model.adapter.dim == 2 else [])
    assert main([str(mixed), "--ranks", "1", "--only", "whole"]) == 0
    text = (mixed.parent / "out" / "table.md").read_text()
    assert text.count("weights not here") == 2 and "own: weights not here" in text and "own: waiting" in text


def test_rows_are_planned_and_nothing_is_run(mixed, pretender, monkeypatch, capsys):  # noqa: F811
    asked = []

    def planned(settings):
        asked.append((settings.config.model.adapter.dim, settings.config.data.fraction, settings.options["card"]))
        return {
            "steps_per_epoch": None, "duration": {"step_seconds": 3.6, "origin": "H100"}, "gpus": 8,
            "parameters": {"all": {"trainable": 50, "total": 1000}}, "full_qformer_tuning": None,
            "memory_per_rank": {"peak_gib": 16.11},
        }  # fmt: skip

    monkeypatch.setattr("vltrain.programs.plan.plan_recipe", planned)
    text = (
        mixed.read_text()
        .replace("ablation: {", "ablation: {packs: 4000, ")
        .replace("rows:\n  small: {", "rows:\n  small: {data: {fraction: 0.1}, ")
    )
    mixed.write_text(text.replace("base: base.yaml\n", "base: base.yaml\ntrain: {max_steps: null, epochs: 2}\n"))
    words = [
        str(mixed),
        "--plan",
        "--gpus",
        "8",
        "--card",
        "H100",
        "--utilisation",
        "0.4",
        "--train.packs_per_step",
        "4",
    ]
    assert main(words) == 0
    assert asked == [(2, 1.0, "H100"), (16, 1.0, "H100")] and not pretender.commands
    out = mixed.parent / "out"
    lines = {cells(line)[0]: cells(line) for line in (out / "table.md").read_text().split("\n\n")[0].splitlines()}
    # 2 epochs of 400 packs by 4: 200 steps of 3.6 seconds; of all 4,000: ten times that
    assert lines["small"][-2:] == ["16.1", "0.2"] and lines["silu"][-2:] == ["16.1", "2.0"]
    assert lines["small"][2:5] == ["50", "5.00", "waiting"] and lines["gone"][-2:] == ["", ""]
    assert "own: waiting; planned 16.1 GiB, 2.0 h on 8 GPUs" in (out / "table.md").read_text()
    assert main([str(mixed), "--ranks", "1", "--only", "small", *words[-2:]]) == 0
    assert "planned 16.1 GiB" in (out / "table.md").read_text(), "it is kept"
    (out / "planned.json").write_text('{"small": {}}')
    assert main([str(mixed), "--ranks", "1", "--only", "small", *words[-2:]]) == 2
    assert "planned.json: small: found no plan" in capsys.readouterr().err


def test_what_only_a_plan_uses_is_refused_without_it(table, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ablate, "launch", lambda *_: pytest.fail("nothing is run"))
    assert main([str(table), "--card", "H100"]) == 2
    assert "--card: has no effect without --plan" in capsys.readouterr().err
