"""launch/submit.py: what it writes, what it refuses on the login node, and what the job then runs. sbatch is a stand-in
here; the real one is in tests/slurm."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.support.processes import ROOT
from vltrain.programs.submit import main

RECIPE = str(ROOT / "launch" / "recipes" / "quickstart.yaml")
GIVEN = ["--recipe", RECIPE, "--ds", str(ROOT / "ds_configs" / "zero2.json"), "--nodes", "2", "--gpus-per-node", "4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with an sbatch that keeps its words."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\n[ -e "{tmp_path}/refuse" ] && {{ echo "sbatch: error: invalid account" >&2; exit 1; '
        f'}}\necho "$@" > "{tmp_path}/words"\necho "4711;cluster"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options_of(sbatch: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in sbatch.splitlines() if line.startswith("#SBATCH ")]


def test_dry_run_prints_the_file_and_leaves_nothing(here, capsys):
    assert (
        main(
            [
                *GIVEN,
                "--time",
                "1-12:00:00",
                "--account",
                "vision",
                "--partition",
                "gpu",
                "--sbatch=--exclusive --comment='a b'",
                "--dry-run",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    run = here / "runs" / "quickstart"
    assert {
        "--requeue",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=1-12:00:00",
        "--account=vision",
        "--partition=gpu",
    } <= set(options_of(text))
    assert {f"--chdir={here}", f"--output={run}/logs/slurm-%j.log", "--exclusive", "'--comment=a b'"} <= set(
        options_of(text)
    )
    assert "#@" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert sorted(path.name for path in here.iterdir()) == ["bin"]


def test_submitted_and_frozen(here, capsys):
    assert main([*GIVEN, "--train.max_steps", "5", "--gpu-memory", "40"]) == 0
    said = capsys.readouterr().out
    run = here / "runs" / "quickstart"
    assert (
        "job 4711: 8 rank(s) on 2 node(s), ZeRO stage 2, planned peak" in said
        and f"tensorboard --logdir {run}/tensorboard" in said
    )
    frozen = run / "frozen"
    assert (here / "words").read_text().split() == ["--parsable", str(frozen / "train_mmt.sbatch")]
    recipe = yaml.safe_load((frozen / "recipe.yaml").read_text())
    assert recipe["train"]["max_steps"] == 5 and recipe["output"] == str(run)
    assert json.loads((frozen / "ds.json").read_text())["zero_optimization"]["stage"] == 2
    # The job's code is the copy, and it knows the commit that it was.
    command = [
        sys.executable,
        "-c",
        "import vltrain; from vltrain.train.run.provenance import code_commit; print(vltrain.__file__, code_commit())",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(frozen / "code")},
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        str(frozen / "code" / "vltrain" / "__init__.py"),
        (frozen / "code" / "COMMIT").read_text().strip(),
    ]
    assert main([*GIVEN]) == 2
    assert "was submitted before; resume it by sbatch" in capsys.readouterr().err


def test_what_sbatch_refuses_leaves_nothing_frozen(here, capsys):
    (here / "refuse").touch()
    assert main(GIVEN) == 2
    assert "sbatch refused the job: sbatch: error: invalid account" in capsys.readouterr().err
    assert not (here / "runs" / "quickstart" / "frozen").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nodes", "0"], "--nodes: found '0'"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0 needs --ranks-per-node"),
        (["--ranks-per-node", "3"], "a rank has one GPU"),
        (["--time", "tomorrow"], "--time: found 'tomorrow'"),
        (["--sbatch", "'open"], "--sbatch: found"),
        (["--acount", "a"], "did you mean 'account'?"),
        (["--train.packs_per_stpe", "3"], "packs_per_step"),
        (["--gpu-memory", "0.001"], "more than 0.001 GiB; take more ranks"),
        (["--gpu-memory", "much"], "--gpu-memory: found 'much'"),
        (["--ds", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_found_on_the_login_node(here, capsys, words, named):
    assert main([*GIVEN, *words]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == ["bin"]


def test_a_cluster_without_slurm(here, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(GIVEN) == 2
    assert "sbatch: not found" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_mmt.sbatch", "prepare.sbatch"])
def test_the_files_are_bash(name):
    assert subprocess.run(["bash", "-n", str(ROOT / "launch" / "slurm" / name)]).returncode == 0


@pytest.mark.slow
def test_an_instructblip_is_planned_too(here, capsys):
    given = [
        "--recipe",
        str(ROOT / "launch" / "recipes" / "qformer_shapes.yaml"),
        "--nodes",
        "1",
        "--gpus-per-node",
        "2",
        "--dry-run",
    ]
    assert main(given) == 0 and "--ntasks-per-node=2" in capsys.readouterr().out
    assert (
        main([*given, "--gpu-memory", "1"]) == 2
        and "GiB on each of 2 ranks, more than 1 GiB" in capsys.readouterr().err
    )
