"""`vltrain ablate`: real runs interrupted and gone on with; and, with programs that only pretend, what is run, told,
kept and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from tests.support.processes import ROOT
from tests.support.tiny import SETTINGS
from tests.support.vocabularies import make_sentencepiece
from vltrain.launching import launcher
from vltrain.programs import evaluate
from vltrain.programs.studies import ablate
from vltrain.programs.studies.ablate import main
from vltrain.programs.studies.table import Outcome, to_markdown

NUM_STEPS = 40


def nested(settings: dict) -> dict:
    whole: dict = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = whole
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return whole


@pytest.fixture
def table(tmp_path) -> Path:
    """A table of two rows of the tiny random model, with questions about red pictures to learn from."""
    for number in range(60):
        Image.new("RGB", (20, 10), (255, number, 0)).save(tmp_path / f"{number}.png")
    asked = {"from": "human", "value": "<image>\nred?"}
    talks = [
        {"id": f"s{number}", "image": f"{number}.png", "conversations": [asked, {"from": "gpt", "value": answer}]}
        for number, answer in enumerate(["yes", "no"] * 30)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    own = {
        "model.llm.tokenizer": make_sentencepiece(tmp_path / "tokenizer"),
        "model.llm.config": {**SETTINGS["model.llm.config"], "vocab_size": 320},
        "data.source": "llava_json", "data.input": str(tmp_path / "talks.json"), "data.options": {"val_fraction": 0.2},
        "data.root": str(tmp_path / "data"), "output": str(tmp_path / "base"),
        "train.epochs": 10.0, "train.max_steps": NUM_STEPS, "train.save_every_steps": 1,
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(nested({**SETTINGS, **own})))
    text = f"base: base.yaml\noutput: {tmp_path / 'out'}\nablation: {{split: val, max_samples: 4}}\n"
    text += (
        "rows:\n  small: {model: {adapter: {dim: 2}}}\n  silu: {model: {adapter: {kind: loha_silu, dim: 16, rank: "
        "2}}}\n"
    )
    (tmp_path / "table.yaml").write_text(text)
    return tmp_path / "table.yaml"


def steps_of(row: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (row / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_row_is_interrupted_gone_on_with_evaluated_and_left_alone(table, monkeypatch, caplog):
    """For real, so of one row: starting each program takes seconds. The order of several is below."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "ablate.py"),
        str(table),
        "--only",
        "small",
        "--ranks",
        "1",
        "--train.precision",
        "fp32",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = table.parent / "out"
    first = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list((out / "small" / "checkpoints").glob("step-*")) and first.poll() is None:
        time.sleep(0.02)
    ranks = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGTERM)
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 130, told
    assert "the same command resumes" in told and ranks
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert json.loads((out / "small" / "row.json").read_text())["state"] == "running"

    second = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    log = (out / "small" / "train.log").read_text()
    _, fresh, resumed = log.split("$ deepspeed --num_accelerators 1")
    assert "from step 0" in fresh and "from step 0" not in resumed
    assert steps_of(out / "small") == list(range(NUM_STEPS))
    rows = {row["row"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    # tiny: 4 live ViT blocks and 2 LLM blocks of width 32; a neck 32 -> 8 -> 32; two modality vectors
    shared = 32 * 8 + 8 + 8 * 32 + 32 + 2 * 32
    assert rows["small"]["trained"] == shared + 6 * (32 * 2 + 2 + 2 * 32 // 2 + 32)
    assert (rows["small"]["state"], rows["small"]["steps"], rows["small"]["metrics"]["total"]) == ("done", NUM_STEPS, 4)
    assert rows["small"]["seconds"] > 0 and rows["small"]["settings"] == {"model.adapter.dim": 2}
    assert rows["silu"]["state"] == "waiting" and not (out / "silu").exists()
    assert (out / "table.md").read_text() in second.stdout

    monkeypatch.setattr(ablate, "launch", lambda *_: pytest.fail("a finished row is left alone"))
    before = (out / "table.json").read_text()
    caplog.set_level("INFO")
    assert main(command[2:]) == 0
    assert (out / "table.json").read_text() == before and "small: done already" in caplog.text


class Pretender:
    """In the place of deepspeed: writes what a row's programs write, and remembers their command lines."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.failing: set[str] = set()
        self.interrupts: set[str] = set()
        self.leaves: dict[str, int] = {}

    def __call__(self, program: Path, words: tuple[str, ...], ranks: int, log: Path) -> int:
        self.commands.append([program.stem, str(ranks), *words])
        row = log.parent.name
        if f"{row}/{program.stem}" in self.interrupts:
            raise KeyboardInterrupt
        if f"{row}/{program.stem}" in self.leaves:
            return self.leaves[f"{row}/{program.stem}"]
        if f"{row}/{program.stem}" in self.failing:
            log.write_text("starting\nerror: no such thing as a blue moon\nKilling subprocess 7\n")
            return 2
        if program.stem == "evaluate":
            split = words[words.index("--split") + 1]
            (log.parent / "eval" / split).mkdir(parents=True, exist_ok=True)
            metrics = {
                "step": 7,
                "measure": "accuracy",
                "accuracy": 0.25,
                "total": 8,
                "failed": 3,
                "columns": {"NAT": {"accuracy": 0.5}},
            }
            (log.parent / "eval" / split / "metrics.json").write_text(json.dumps(metrics))
        else:
            parameters = {"neck": {"total": 10, "trainable": 10}, "llm": {"total": 90, "trainable": 0}}
            (log.parent / "run.json").write_text(json.dumps({"parameters": parameters}))
        return 0


@pytest.fixture
def pretender(monkeypatch) -> Pretender:
    made = Pretender()
    monkeypatch.setattr(ablate, "launch", made)
    return made


def test_what_is_run_and_what_is_told(table, pretender, capsys):
    out = table.parent / "elsewhere"
    words = ["--only", "small", "--ranks", "3", "--output", str(out), "--optim.lr", "0.5", "--eval.max_samples=9"]
    assert main([str(table), *words, "--ds", "ds_configs/zero2.json"]) == 0
    folder = str(out / "small")
    recipe = ["--recipe", f"{table}#small", "--output", folder]
    assert pretender.commands == [
        ["train_mmt", "3", *recipe, "--optim.lr=0.5", "--eval.max_samples=9", "--ds", "ds_configs/zero2.json"],
        ["evaluate", "3", folder, "--split", "val", "--eval.max_samples", "9"],
    ]
    lines = (out / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "row",
        "different",
        "trained",
        "% trained",
        "accuracy",
        "NAT",
        "questions",
        "failed",
        "seconds",
        "steps",
    ]
    assert cells[2] == ["small", "adapter.dim 2", "10", "10.00", "25.00", "50.00", "8", "3", "0", "7"]
    assert cells[3][:5] == ["silu", "adapter.kind loha_silu, adapter.dim 16, adapter.rank 2", "", "", "waiting"]
    assert len({len(line) for line in lines}) == 1 and lines[-1] in capsys.readouterr().out
    assert [path.name for path in (out / "hparams").iterdir()] == ["small"], "the row that is done"
    content = EventAccumulator(str(out / "hparams" / "small")).Reload().PluginTagToContent("hparams")
    session = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    settings = {"model.adapter.dim", "model.adapter.kind", "model.adapter.rank"}
    assert set(session.hparams) == settings and session.hparams["model.adapter.dim"].number_value == 2


def test_a_row_that_fails_is_told_and_the_others_are_run(table, pretender, caplog):
    pretender.failing = {"small/train_mmt"}
    assert main([str(table), "--ranks", "1"]) == 1
    out = table.parent / "out"
    assert "row small failed" in caplog.text and "error: no such thing as a blue moon" in caplog.text
    states = {row["row"]: (row["state"], row["reason"]) for row in json.loads((out / "table.json").read_text())["rows"]}
    assert states["silu"] == ("done", None) and states["small"][0] == "failed" and "blue moon" in states["small"][1]
    pretender.failing, pretender.commands = set(), []
    assert main([str(table), "--ranks", "1"]) == 0
    assert [command[0] for command in pretender.commands] == ["train_mmt", "evaluate"], (
        "the failed row alone is run again"
    )


def test_a_trained_row_is_only_evaluated_again(table, pretender):
    pretender.interrupts = {"small/evaluate"}
    assert main([str(table), "--ranks", "1"]) == 130
    assert [command[0] for command in pretender.commands] == ["train_mmt", "evaluate"], "no other row is begun"
    pretender.interrupts, pretender.commands = set(), []
    assert main([str(table), "--ranks", "1", "--only", "small"]) == 0
    assert [command[0] for command in pretender.commands] == ["evaluate"]


def test_an_untuned_row_is_answered_and_neither_trained_nor_planned(table, pretender, monkeypatch, capsys):
    trained = table.read_text()
    table.write_text(trained.replace("ablation: {", "ablation: {untuned: [small], "))
    assert main([str(table), "--ranks", "1"]) == 0
    out = table.parent / "out"
    assert pretender.commands[0] == [
        "evaluate", "1", str(out / "small"), "--split", "val", "--checkpoint", "none", "--eval.max_samples", "4",
    ]  # fmt: skip
    assert [command[0] for command in pretender.commands[1:]] == ["train_mmt", "evaluate"], "the other row"
    record = json.loads((out / "table.json").read_text())["rows"][0]
    assert record["trained"] == 0 < record["parameters"]
    table.write_text(trained)
    assert main([str(table), "--only", "small"]) == 2
    assert "ablation.untuned was True, is None" in capsys.readouterr().err

    table.write_text(trained.replace("ablation: {", "ablation: {untuned: [small], "))
    monkeypatch.setattr(ablate, "launch", lambda program, words, ranks, log: evaluate.main(list(words)))
    again = ["--output", str(table.parent / "real"), "--only", "small", "--train.precision", "fp32"]
    assert main([str(table), *again]) == 0, "the very program answers by it"
    metrics = json.loads((table.parent / "real" / "small" / "eval" / "val" / "metrics.json").read_text())
    assert (metrics["step"], metrics["total"], metrics["checkpoint"]) == (0, 4, None)


def test_an_untuned_row_whose_weights_are_not_there_fails_alone(table, pretender):
    table.write_text(table.read_text().replace("ablation: {", "ablation: {untuned: [small], "))
    assert main([str(table), "--only", "small", "--model.llm.source", "gone", "--model.llm.config", "{}"]) == 1
    record = json.loads((table.parent / "out" / "table.json").read_text())["rows"][0]
    assert record["state"] == "failed" and "gone" in record["reason"] and not pretender.commands


def test_figures_of_other_settings_are_not_mixed(table, pretender, capsys):
    assert main([str(table), "--only", "small"]) == 0
    assert main([str(table), "--only", "silu", "--train.log_every_steps", "3", "--data.workers", "1"]) == 0, (
        "these change no figure"
    )
    for changed, said in (
        (["--optim.lr", "0.5"], "optim.lr was 0.003, is 0.5"),
        (["--eval.spread", "even"], "eval.spread was 'drawn', is 'even'; go on as it was (--eval.spread drawn)"),
        (["--split", "train"], "split was 'val', is 'train'"),
    ):
        assert main([str(table), *changed]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and said in line and "another --output" in line


def test_a_table_chooses_its_programs(table, pretender):
    table.write_text(table.read_text().replace("ablation: {", "ablation: {program: ablate, "))
    assert main([str(table), "--only", "small"]) == 0
    assert [command[0] for command in pretender.commands] == ["ablate", "evaluate"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no table"]),
        (["TABLE", "stray"], ["'stray' behind the table", "--only stray"]),
        (["TABLE", "--only", "smal"], ["no row 'smal'", "did you mean 'small'"]),
        (["TABLE", "--only", "small", "slu"], ["no row 'slu'"]),
        (["TABLE", "--ranks", "0"], ["--ranks: found '0'"]),
        (["TABLE", "--optim.lrr", "1"], ["--optim.lrr", "did you mean 'optim.lr'"]),
        (["TABLE", "--model.adapter.groups", "4"], ["model.adapter.groups", "row 'small'"]),
        (["TABLE", "--recipe", "x"], ["--recipe cannot be used with a table"]),
        (["TABLE", "--print_config"], ["--print_config cannot be used", "TABLE#small"]),
        (["TABLE", "--ds", "gone.json"], ["gone.json"]),
        (["BASE"], ["no 'rows'"]),
    ],
)
def test_a_mistake_ends_with_one_line_before_anything_is_run(table, pretender, capsys, words, parts):
    words = [
        str(table if word == "TABLE" else table.parent / "base.yaml") if word in ("TABLE", "BASE") else word
        for word in words
    ]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part.replace("TABLE", str(table)) in said for part in parts), said
    assert not pretender.commands and not (table.parent / "out").exists()


def test_an_unknown_program_is_met_with_the_nearest(table, pretender, capsys):
    table.write_text(table.read_text().replace("ablation: {", "ablation: {program: train_mt, "))
    assert main([str(table)]) == 2
    assert (
        "ablation.program: found 'train_mt'" in (said := capsys.readouterr().err) and "did you mean 'train_mmt'" in said
    )


def test_two_at_once_in_one_folder_are_refused(table, pretender, capsys):
    (table.parent / "out").mkdir()
    other = (
        "import sys; from pathlib import Path; from vltrain.files.lock import *; f = Path(sys.argv[1])\nwith "
        "one_writer(lock_inside(f), f): print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", other, table.parent / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        assert main([str(table)]) == 2
        writer.stdin.close()
    assert f"pid {writer.pid}" in capsys.readouterr().err


def test_a_damaged_outcome_is_named(table, pretender, capsys):
    (table.parent / "out" / "small").mkdir(parents=True)
    (table.parent / "out" / "small" / "row.json").write_text('{"state": "do')
    assert main([str(table)]) == 2
    assert "small/row.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("error: first\nerror: last\nKilling subprocess 3\n", "error: last"),
        (
            "Traceback (most recent call last):\n  File x\nRuntimeError: out of memory\nreturn code = 1\n",
            "RuntimeError: out of memory",
        ),
        ("train:  10%|x\rtrain:  20%|x", "train:  20%|x"),
        ("", "it said nothing"),
    ],
)
def test_why_a_program_failed_is_found_in_its_log(tmp_path, text, reason):
    (tmp_path / "log").write_text(text)
    assert launcher.reason_of_failure(tmp_path / "log") == reason


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "vltrain ablate TABLE.yaml" in capsys.readouterr().out


def test_a_row_that_keeps_its_best_checkpoint_answers_by_it(table, pretender, capsys):
    assert main([str(table), "--only", "small", "--train.eval_every_steps", "5"]) == 0
    assert "--checkpoint" not in pretender.commands[-1]
    assert main([str(table), "--only", "small", "--train.eval_every_steps", "7"]) == 0, (
        "a row's last checkpoint does not depend on evaluations"
    )
    words = [
        "--only",
        "small",
        "--output",
        str(table.parent / "best"),
        "--train.keep_best",
        "true",
        "--train.eval_every_steps",
    ]
    assert main([str(table), *words, "5"]) == 0
    assert pretender.commands[-1][pretender.commands[-1].index("--checkpoint") + 1] == "best"
    assert main([str(table), *words, "7"]) == 2 and "eval_every_steps was 5, is 7" in capsys.readouterr().err


def test_an_instructblips_percentages_are_of_full_qformer_tuning():
    outcomes = {
        "lora": Outcome(
            state="done",
            parameters=1000,
            trained=5,
            full_qformer=50,
            steps=1,
            metrics={"total": 1, "failed": 0, "accuracy": 1.0, "columns": {}},
        )
    }
    lines = to_markdown({"lora": {}}, outcomes).splitlines()
    assert "% of full Q-Former" in lines[0] and " 10.00 " in lines[2]


@pytest.mark.parametrize("code", [85, 130])
def test_a_row_that_was_asked_to_leave_has_not_failed(table, pretender, capsys, code):
    pretender.leaves = {"small/train_mmt": code}
    assert main([str(table), "--ranks", "1"]) == code
    assert json.loads((table.parent / "out" / "small" / "row.json").read_text())["state"] == "running"
    pretender.leaves = {}
    assert main([str(table), "--ranks", "1"]) == 0
