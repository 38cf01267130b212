"""`vltrain compare` over folders of real runs: what was planted into one is what is shown, at its step."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.attacks.attack import run_vltrain
from tests.support.processes import ROOT
from vltrain.files.lock import lock_inside, one_writer
from vltrain.programs.compare.curves import DIFFERENCE, smoothed
from vltrain.receipts.receipt import next_line, read_receipt

STORED = ROOT / "tests" / "golden" / "stored"


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two folders of one run of eight steps."""
    for name in ("a", "b"):
        shutil.copytree(STORED / "mmt" / "run", tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def compare(*words: object) -> tuple[int, str]:
    return run_vltrain(["compare", *words])


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def change_log(run: Path, first: int, **factors: float) -> None:
    """Multiplies figures from a step on."""
    lines = log_of(run)
    for line in lines[first:]:
        line.update({name: line[name] * factor for name, factor in factors.items()})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_receipt(run: Path, changed: dict[int, dict]) -> None:
    """Writes the receipt anew, with other fields in some steps and a chain that fits."""
    receipt = read_receipt(run / "receipt.jsonl")
    chain, texts = receipt.header.chain, [receipt.header.dumps()]
    for line in receipt.lines:
        line = next_line(chain, replace(line, **changed.get(line.step, {})))
        chain = line.chain
        texts.append(line.dumps())
    (run / "receipt.jsonl").write_text("".join(texts))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def row(output: str, name: str) -> list[str]:
    """The cells behind a name, in the only line that begins with it."""
    (line,) = [line for line in output.splitlines() if re.match(rf" *{re.escape(name)}  ", line)]
    return re.split(r" {2,}", line.strip())[1:]


def test_a_run_beside_itself_is_the_same(runs, tmp_path):
    code, output = compare(*runs, "--tolerance", "0", "--out", tmp_path / "curves.png")
    assert code == 0
    assert "losses of a and b: equal bit for bit in all 8 common steps" in output
    assert "recipe: the same in all of them" in output and "environment: the same in all of them" in output
    assert "ok      b beside a: the same run; the same samples in all 8 common steps" in output
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5


def test_losses_part_where_it_was_planted_and_what_differed_before_is_told(runs):
    change_log(runs[1], 3, lr=2.0)
    change_log(runs[1], 4, loss=1.01, grad_norm=1.3)
    code, output = compare(*runs)
    assert code == 0 and "part at step 4" in output and "equal bit for bit in the 4 before" in output
    before, after = log_of(runs[0])[4], log_of(runs[1])[4]
    assert row(output, "loss") == [f"{before['loss']:.6g}", f"{after['loss']:.6g}", "differs"]
    assert row(output, "learning rate")[2] == "differs since step 3"
    assert row(output, "gradient norm")[2] == "differs"
    assert row(output, "samples")[2] == row(output, "label tokens")[2] == row(output, "ranks")[2] == "the same"
    assert compare(*runs, "--tolerance", "0.02")[0] == 0
    code, output = compare(*runs, "--tolerance", "0.005")
    assert code == 1 and "part at step 4" in output


def test_other_samples_and_a_skipped_update_are_told(runs):
    change_log(runs[1], 6, loss=2.0)
    change_receipt(runs[1], {5: {"samples": "f" * 32, "skipped": True}, 6: {"label_tokens": 1}})
    _, output = compare(*runs)
    assert "b beside a: the same run; other samples from step 5 on" in output and "part at step 6" in output
    assert row(output, "samples")[2] == "differs since step 5"
    assert row(output, "update skipped") == ["no", "no", "differs since step 5"]
    assert row(output, "label tokens")[1:] == ["1", "differs"]


def test_recipe_and_environment_by_their_keys(runs):
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace("lr: 0.003", "lr: 0.006").replace("output: run", "output: x"))
    facts = json.loads((runs[1] / "run.json").read_text())
    change_json(runs[1] / "run.json", ranks=2, packages={**facts["packages"], "torch": "9.9"}, commit="e" * 40)
    ds_config = json.loads((runs[1] / "ds_config.json").read_text())
    change_json(runs[1] / "ds_config.json", zero_optimization={**ds_config["zero_optimization"], "stage": 3})
    code, output = compare(*runs)
    assert code == 0
    assert row(output, "optim.lr") == ["0.003", "0.006"] and "output" not in output
    assert row(output, "ranks") == ["1", "2"] and row(output, "packages.torch")[1] == "9.9"
    assert row(output, "deepspeed.zero_optimization.stage")[1] == "3"
    assert row(output, "commit")[1] == "eeeeeeeeeeee..."
    sections = [line.split("  ")[0] for line in output.splitlines() if re.match(r"(recipe|environment)  ", line)]
    assert sections == ["recipe", "environment"]


def test_figures_of_evaluations_stand_side_by_side(runs):
    metrics = json.loads((runs[1] / "eval/test/metrics.json").read_text())
    columns = {"shape": {"accuracy": 0.25, "correct": 1, "total": 4}, **metrics["columns"]}
    change_json(runs[1] / "eval/test/metrics.json", accuracy=0.5, columns=columns, samples="0" * 64)
    shutil.copytree(runs[1] / "eval/test", runs[1] / "eval/val")
    _, output = compare(*runs)
    assert row(output, "test: accuracy") == ["0", "0.5"] and row(output, "val: accuracy") == ["-", "0.5"]
    assert row(output, "test: accuracy of shape") == ["-", "0.25"]
    assert "test: samples (different)" in output and "val: samples" not in output


def test_runs_that_still_train(runs):
    """One has done five steps and is in the middle of writing the sixth."""
    for name in ("log.jsonl", "receipt.jsonl"):
        lines = (runs[1] / name).read_text().splitlines(keepends=True)
        kept = lines[: 6 if name == "receipt.jsonl" else 5]
        (runs[1] / name).write_text("".join(kept) + lines[len(kept)][:20])
    shutil.rmtree(runs[1] / "eval")
    with one_writer(lock_inside(runs[1]), runs[1]):
        code, output = compare(*runs, "--tolerance", "0")
    assert code == 0 and "5 of 8 steps, still training" in output and "8 of 8 steps\n" in output
    assert "equal bit for bit in all 5 common steps" in output and "chain of 5 of 8 steps is whole" in output
    assert row(output, "test: accuracy") == ["0", "-"]


def test_a_run_without_receipt_and_one_whose_receipt_is_broken(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "c")
    (runs[1] / "receipt.jsonl").unlink()
    change_log(runs[1], 2, loss=0.5)
    code, output = compare(*runs, tmp_path / "c")
    assert code == 0 and "b: no receipt, so that its samples are not known" in output
    assert row(output, "samples")[1:] == ["-", "not known: no receipt"]
    assert "losses of a and c: equal bit for bit" in output, "each one is compared with the first"
    assert "ok      c beside a" in output
    lines = (tmp_path / "c" / "receipt.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c" / "receipt.jsonl").write_text("".join([*lines[:3], *lines[4:]]))
    code, output = compare(*runs, tmp_path / "c")
    assert code == 1 and "FAILED  c: line 4: step 3, expected step 2" in output


def test_a_loss_that_is_not_a_number_parts_from_one_that_is(runs):
    lines = log_of(runs[1])
    lines[3]["loss"] = "nan"
    (runs[1] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = compare(*runs, "--out", runs[0] / "o.png")
    assert code == 0 and "part at step 3" in output and row(output, "loss")[1:] == ["nan", "differs"]
    shutil.rmtree(runs[0])
    shutil.copytree(runs[1], runs[0])
    assert "equal bit for bit in all 8" in compare(*runs)[1], "two that are NaN in the same step are alike"


def test_tensorboard_lays_the_curves_over_each_other(runs, tmp_path):
    change_log(runs[1], 4, loss=1.5)
    assert compare(*runs, "--tensorboard", tmp_path / "compared")[0] == 0
    for run in runs:
        events = EventAccumulator(str(tmp_path / "compared" / run.name), size_guidance={"scalars": 0}).Reload()
        for tag, name in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("train/lr", "lr")):
            found = [(event.step, event.value) for event in events.Scalars(tag)]
            assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log_of(run)]
        assert [event.step for event in events.Scalars("eval/test/accuracy")] == [8]
    differences = [event.value for event in events.Scalars(DIFFERENCE)]
    assert differences == [0.0] * 4 + [pytest.approx(1 / 3, rel=1e-6)] * 4
    assert sorted(path.name for path in (tmp_path / "compared").iterdir()) == ["a", "b"]


def test_stages_are_compared_with_their_like(tmp_path):
    for name in ("a", "b"):
        for stage in ("1-neck", "2-all"):
            shutil.copytree(STORED / "mmt" / "run", tmp_path / name / stage)
        (tmp_path / name / "stages.json").write_text(json.dumps({"stages": ["1-neck", "2-all"]}))
    change_log(tmp_path / "b" / "2-all", 2, loss=2.0)
    code, output = compare(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o.png")
    first, second = output.split("stage 2-all")
    assert code == 0 and "stage 1-neck" in first and "equal bit for bit in all 8" in first
    assert "part at step 2" in second
    shutil.rmtree(tmp_path / "b" / "2-all")
    code, output = compare(tmp_path / "a", tmp_path / "b")
    assert code == 0 and "stage 2-all: not compared, not all runs have begun it" in output
    code, output = compare(tmp_path / "a", tmp_path / "a" / "2-all")
    assert code == 2 and "have not the same stages" in output


def test_other_data_only_on_request(runs, tmp_path):
    other = STORED / "instructblip" / "run"
    code, output = compare(runs[0], other, "--out", tmp_path / "o.png")
    (line,) = output.strip().splitlines()
    assert code == 2 and not (tmp_path / "o.png").exists()
    assert "train-f9d17ba9c50f" in line and "train-8e93ffb0f427" in line and "--different-data" in line
    code, output = compare(runs[0], other, "--different-data", "--out", tmp_path / "o.png")
    assert code == 0 and row(output, "model.architecture") == ["mmt", "instructblip"] and "part at" not in output
    assert (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a"], "expected two runs or more"),
        (["a", "nowhere"], "no config.yaml in it"),
        (["a", "a"], "is there twice"),
        (["a", "b", "--out", "there.png"], "there.png: exists already; remove it or name another file"),
        (["a", "b", "--out", "curves.jpg"], "expected a file that ends in .png"),
        (["a", "b", "--tensorboard", "full"], "full: exists already"),
        (["a", "b", "--tolerance", "2"], "expected a relative difference such as 1e-5"),
        (["a", "b", "--tolerance", "nan"], "expected a relative difference such as 1e-5"),
        (["a", "b", "--otu", "x.png"], "unknown option '--otu', did you mean 'out'?"),
        (["a", "b", "--different-data"], "has no effect"),
        (["a", "idle"], "no step is done yet"),
        (["a", "damaged"], "log.jsonl:2: not a step"),
    ],
)
def test_a_mistake_is_one_line(runs, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name in ("idle", "damaged"):
        shutil.copytree(runs[0], tmp_path / name)
    (tmp_path / "idle" / "log.jsonl").unlink()
    lines = (tmp_path / "damaged" / "log.jsonl").read_text().splitlines()
    (tmp_path / "damaged" / "log.jsonl").write_text("\n".join([lines[0], "{}", *lines[2:], ""]))
    before = sorted(tmp_path.rglob("*"))
    code, output = compare(*words)
    assert code == 2 and told in output and len(output.strip().splitlines()) == 1, output
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.png").read_bytes() == b"mine"


def test_a_long_curve_is_smoothed_by_the_mean_around_each_step():
    values = np.random.default_rng(0).normal(size=400)
    values[[0, 7, 399]] = np.nan
    found = smoothed(values.tolist())
    for place in range(400):
        assert found[place] == pytest.approx(np.nanmean(values[max(place - 8, 0) : place + 9]), rel=1e-12)
