"""The Python API: its examples run, importing it is cheap, and mistakes are raised."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vltrain
from tests.support.answering_run import answering_run
from vltrain.config.command_line import load_settings
from vltrain.config.recipe import dump_config

ASKED = {"begin": "Question: ", "end": "\nAnswer:", "multi_turn": False, "images": True}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the run and the image that the examples name."""
    place = tmp_path_factory.mktemp("api")
    run = answering_run("mmt", place / "made")
    shutil.copytree(run.folder, place / "runs" / "quickstart")
    (place / "runs" / "quickstart" / "run.json").write_text(json.dumps({"data": {"asked": ASKED}}))
    shutil.copy(run.images / "one.png", place / "shape.png")
    return place


def examples(module: str) -> list[doctest.DocTest]:
    return [
        test
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
        if test.examples
    ]


FAST = [
    test
    for module in ("vltrain", "vltrain.inference.load", "vltrain.inference.model", "vltrain.api")
    for test in examples(module)
    if test.name != "vltrain.api.train"
]


def run_examples(test: doctest.DocTest) -> None:
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS).run(test, out=told.append)
    assert not told, "".join(told)


def test_there_are_examples():
    assert {
        "vltrain",
        "vltrain.inference.load.load",
        "vltrain.inference.model.LoadedModel.ask",
        "vltrain.api.prepare",
    } <= {test.name for test in FAST}


@pytest.mark.parametrize("test", FAST, ids=lambda test: test.name)
def test_the_examples_are_right(test, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    run_examples(test)


@pytest.mark.slow
def test_the_example_of_training_is_right_and_its_run_answers(workplace, monkeypatch):
    """In one process after another training of it: nothing of the first is left behind."""
    monkeypatch.chdir(workplace)
    run_examples(examples("vltrain.api")[[test.name for test in examples("vltrain.api")].index("vltrain.api.train")])
    again = vltrain.train("quickstart", ds="zero2", train__max_steps=2, eval__max_samples=8, output="runs/again")
    losses = [
        [json.loads(line)["loss"] for line in (run / "receipt.jsonl").read_text().splitlines() if "loss" in line]
        for run in (Path("runs/short"), again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    model = vltrain.load(again)
    assert model.asked.begin == "Question: " and model.ask(["shape.png"], "what color is the shape?").token_ids


def test_importing_is_cheap_and_names_are_there_when_asked_for():
    code = (
        "import sys, vltrain; early = [name for name in ('torch', 'numpy', 'yaml', 'transformers') if name in "
        "sys.modules];"
        "missing = set(vltrain.__all__) - set(dir(vltrain)); print(early, missing); import "
        "vltrain.metrics.step_log; print(callable(vltrain.train))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[] set()\nTrue\n"
    )
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        vltrain.lode


def test_training_is_told_what_the_command_line_would_be(monkeypatch, tmp_path):
    import vltrain.programs.train as program

    told = []
    main = lambda words, program: None
    main.__wrapped__ = lambda words, program: told.append(words)
    monkeypatch.setattr(program, "main", main)
    given = {
        "optim.lr": 2e-3,
        "optim__betas": (0.9, 0.99),
        "data.options": {"val_images": 5},
        "train.max_steps": None,
        "train__deterministic": False,
        "output": tmp_path,
    }
    assert vltrain.train("quickstart", ds="zero2", **given) == tmp_path
    settings = load_settings(told[0], program="test", options=program.TRAIN_OPTIONS)
    by_hand = [
        "--recipe",
        "quickstart",
        "--optim.lr",
        "2e-3",
        "--optim.betas",
        "[0.9, 0.99]",
        "--data.options",
        "{val_images: 5}",
        "--train.deterministic",
        "false",
        "--output",
        str(tmp_path),
    ]
    assert dump_config(settings.config) == dump_config(load_settings(by_hand, program="test").config)
    assert settings.options["ds"] == "zero2" and settings.options["rebuild"] is None
    vltrain.train("quickstart", rebuild=True, resume="never", output=tmp_path)
    assert "--rebuild" in told[1] and "--resume=never" in told[1]


def test_ranks_are_processes_and_one_that_fails_is_an_error(monkeypatch, tmp_path):
    from vltrain.launching import local_ranks

    started = []
    monkeypatch.setattr(
        local_ranks,
        "run_on_ranks",
        lambda command, words, ranks: started.append((command, words, ranks)) or len(started) - 1,
    )
    assert vltrain.train("quickstart", ranks=2, output=tmp_path) == tmp_path
    assert started == [("train", ["--recipe=quickstart", f"--output={tmp_path}"], 2)]
    with pytest.raises(vltrain.InputError, match="a rank ended with exit code 1"):
        vltrain.train("quickstart", ranks="auto", output=tmp_path)
    assert started[1][2] >= 1


def test_mistakes_are_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings, told in (
        ({"model__adapter__dims": 8}, "did you mean 'model.adapter.dim'"),
        ({"optim.lr": "fast"}, "optim.lr: found 'fast'"),
        ({"ranks": 0}, "--ranks: found '0'"),
    ):
        with pytest.raises(vltrain.InputError, match=told):
            vltrain.train("quickstart", **settings)
    with pytest.raises(vltrain.InputError, match="unknown source 'shape'; did you mean 'shapes'"):
        vltrain.prepare("shape", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_callable_package_has_the_functions_signature():
    assert inspect.signature(vltrain.train) == inspect.signature(importlib.import_module("vltrain.api").train)
