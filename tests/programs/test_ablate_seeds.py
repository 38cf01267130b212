"""`vltrain ablate --seeds`: which runs are begun, gone on with, told and refused, with programs that only pretend; and
a real table of two seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.programs.test_ablate import Pretender, pretender, table  # noqa: F401
from vltrain.programs.studies.ablate import main
from vltrain.train.checkpoints.checkpoint import newest_checkpoint


class Answering(Pretender):
    """Its rows answer 40 questions: `small` the first 20 and a seed's number more, `silu` 10 more than that."""

    def __call__(self, program: Path, words: tuple[str, ...], ranks: int, log: Path) -> int:
        code = super().__call__(program, words, ranks, log)
        if program.stem == "evaluate" and code == 0 and log.parent.name.startswith("seed-"):
            row, seed = log.parent.parent.name, int(log.parent.name.removeprefix("seed-"))
            right = 20 + seed % 7 + (10 + seed % 2 if row == "silu" else 0)
            folder = log.parent / "eval" / "val"
            lines = [json.dumps({"id": f"q{number}", "correct": number < right}) for number in range(40)]
            (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
            metrics = json.loads((folder / "metrics.json").read_text())
            (folder / "metrics.json").write_text(json.dumps({**metrics, "accuracy": right / 40, "total": 40}))
        return code


@pytest.fixture
def answering(pretender, monkeypatch) -> Answering:  # noqa: F811
    made = Answering()
    monkeypatch.setattr("vltrain.programs.studies.ablate.launch", made)
    return made


def begun(made: Pretender) -> list[str]:
    return [
        f"{Path(words[words.index('--output') + 1]).relative_to(Path(words[words.index('--output') + 1]).parents[1])}"
        for words in made.commands
        if words[0] == "train_mmt"
    ]


def test_each_row_is_run_with_each_seed_and_the_rows_are_compared(table, answering, capsys):  # noqa: F811
    out = table.parent / "out"
    assert main([str(table), "--ranks", "1", "--seeds", "3", "--train.seed", "7", "--optim.lr", "0.5"]) == 0
    assert begun(answering) == [f"{row}/seed-{seed}" for seed in (7, 8, 9) for row in ("small", "silu")]
    second = answering.commands[4]
    assert second[6:] == ["--optim.lr=0.5", "--train.seed=8", "--model.seed=1"] and second[4:6] == [
        "--output",
        str(out / "small/seed-8"),
    ]
    text = (out / "table.md").read_text()
    # right: 20, 21, 22 of 40 and 31, 31, 33: differences 11, 10, 11
    assert text in capsys.readouterr().out and "| small |" in text.splitlines()[2]
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[5:9]] == ["52.50", "2.50", "6.21", "3"]
    title, _, _, _, line = text.splitlines()[-5:]
    assert title.startswith("Against small, in points")
    assert [cell.strip() for cell in line.split("|")[1:5]] == ["silu", "+26.67", "3.59", "3"]
    found = json.loads((out / "table.json").read_text())
    assert found["comparison"]["rows"][0]["differs"] == "seed and question"
    assert sorted(path.name for path in (out / "hparams").iterdir())[0] == "silu-seed-7"


def test_it_goes_on_where_it_was_and_takes_further_seeds_in(table, answering):  # noqa: F811
    answering.interrupts = {"seed-1/train_mmt"}
    assert main([str(table), "--seeds", "2"]) == 130
    assert begun(answering) == ["small/seed-0", "silu/seed-0", "small/seed-1"]
    answering.interrupts, answering.commands = set(), []
    assert main([str(table), "--seeds", "3", "--only", "small"]) == 0
    assert begun(answering) == ["small/seed-1", "small/seed-2"]
    rows = {row["row"]: row for row in json.loads((table.parent / "out" / "table.json").read_text())["rows"]}
    assert (rows["small"]["done"], rows["silu"]["done"], rows["silu"]["seeds"]["2"]["state"]) == (3, 1, "waiting")


def test_a_seed_that_fails_leaves_the_rows_others(table, answering, caplog):  # noqa: F811
    answering.failing = {"seed-1/train_mmt"}
    assert main([str(table), "--seeds", "2"]) == 1
    assert "row small, seed 1 failed" in caplog.text
    assert "1 of 2" in (table.parent / "out" / "table.md").read_text()


def test_other_seeds_than_it_was_begun_with_are_refused(table, answering, capsys):  # noqa: F811
    def refused(*words: str) -> str:
        assert main([str(table), *words]) == 2
        said = capsys.readouterr().err.splitlines()
        return said[-1]

    assert main([str(table), "--seeds", "3"]) == 0
    assert "holds runs of the seeds 0, 1, 2" in refused("--seeds", "2")
    assert "expected no others than 5, 6, 7" in refused("--seeds", "3", "--train.seed", "5")
    assert "say --seeds 3 as it was" in refused()
    assert "model.seed was 0, is 4" in refused("--seeds", "3", "--model.seed", "4")
    assert main([str(table), "--seeds", "3", "--against", "silu"]) == 0, "it changes no run"
    assert main([str(table), "--only", "small", "--output", str(table.parent / "once")]) == 0
    assert "begun without --seeds" in refused("--seeds", "2", "--output", str(table.parent / "once"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--seeds", "0"], ["--seeds: found '0'", "from 2 to 100"]),
        (["--seeds", "1"], ["one seed has no spread to test by", "leave the option out"]),
        (["--seeds", "many"], ["--seeds: found 'many'"]),
        (["--seeds", "3", "--train.seed", str(2**63 - 2)], ["above the largest"]),
        (["--against", "smal"], ["--against: no row 'smal'", "did you mean 'small'"]),
        (["--seed", "3"], ["--seed"]),
    ],
)
def test_a_mistake_about_seeds_ends_with_one_line(table, answering, capsys, words, parts):  # noqa: F811
    assert main([str(table), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part in said for part in parts), said
    assert not answering.commands and not (table.parent / "out").exists()


def test_rows_and_tables_that_contradict_seeds_are_refused(table, answering, capsys):  # noqa: F811
    whole = table.read_text()
    table.write_text(whole.replace("{adapter: {dim: 2}}", "{adapter: {dim: 2}, seed: 3}"))
    assert main([str(table), "--seeds", "2"]) == 2 and "row 'small'" in (said := capsys.readouterr().err)
    assert "sets model.seed itself" in said
    table.write_text(whole.replace("ablation: {", "ablation: {against: sillu, "))
    assert main([str(table), "--seeds", "2"]) == 2 and "ablation.against: no row 'sillu'" in capsys.readouterr().err
    table.write_text(whole.replace("ablation: {", "ablation: {against: best, "))
    assert main([str(table), "--seeds", "2"]) == 0
    assert "Against silu, the best (p counts all pairs)" in (table.parent / "out" / "table.md").read_text()


def test_a_row_of_a_share_draws_other_samples_with_each_seed(table, answering):  # noqa: F811
    table.write_text(table.read_text().replace("{model: {adapter: {dim: 2}}}", "{data: {fraction: 0.5}}"))
    assert main([str(table), "--seeds", "2", "--data.fraction_seed", "4"]) == 2, "of silu it would have no effect"
    assert main([str(table), "--seeds", "2"]) == 0
    told = [[word for word in words if "_seed" in word] for words in answering.commands if words[0] == "train_mmt"]
    assert told == [["--data.fraction_seed=0"], [], ["--data.fraction_seed=1"], []]
    made = [
        json.loads((table.parent / "out/small" / f"seed-{n}" / "row.json").read_text())["made_with"] for n in (0, 1)
    ]
    assert [one["data.fraction_seed"] for one in made] == [0, 1] and made[0]["data.fraction"] == 0.5


@pytest.mark.slow
def test_seeds_draw_other_weights_and_other_orders_and_are_resumed(table):  # noqa: F811
    words = [str(table), "--only", "small", "--ranks", "1", "--seeds", "2", "--train.precision", "fp32"]
    assert main([*words, "--train.max_steps", "6", "--ds", "ds_configs/zero2.json"]) == 0
    out = table.parent / "out" / "small"
    first, second = (newest_checkpoint(out / f"seed-{seed}" / "checkpoints") for seed in (0, 1))
    assert first.digest != second.digest and first.step == second.step == 6
    losses = [[json.loads(line)["loss"] for line in (out / f"seed-{n}" / "log.jsonl").open()] for n in (0, 1)]
    assert losses[0] != losses[1]
    (row,) = (one for one in json.loads((out.parent / "table.json").read_text())["rows"] if one["row"] == "small")
    assert row["done"] == 2 and row["spread"]["count"] == 2
