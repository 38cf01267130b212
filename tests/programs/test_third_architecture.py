"""A third architecture is one folder and one line: the programs train, evaluate, resume, export and plan it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.support.processes import on_ranks
from vltrain.train.checkpoints.checkpoint import newest_checkpoint

PROGRAM = "tests/support/third_architecture/program.py"
COLORS = {"red": (200, 20, 20), "blue": (20, 20, 200)}
STEPS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("third")
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                color = list(COLORS)[number % 2]
                Image.new("RGB", (32, 32), COLORS[color]).save(folder / f"{split}-{number}.png")
                turns = [
                    {"role": "user", "text": "<image> what color is it?"},
                    {"role": "assistant", "text": color},
                ]
                sample = {"id": f"{split}{number}", "images": [f"{split}-{number}.png"], "turns": turns}
                file.write(json.dumps(sample) + "\n")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = folder / "recipe.yaml"
    settings = {
        "model": {
            "architecture": "projector",
            "projector": {
                "vision": {**sizes, "image_size": 32, "patch_size": 8},
                "llm": {**sizes, "vocab_size": 768},
            },
        },
        "data": {
            "source": "samples",
            "input": str(folder),
            "root": str(folder / "data"),
            "pack_length": 64,
            "workers": 0,
        },
        "train": {"precision": "fp32", "epochs": 40, "max_steps": STEPS, "save_every_steps": 5, "log_every_steps": 1},
        "optim": {"lr": 0.02},
        "output": str(folder / "run"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*words: str, num_ranks: int = 1) -> list[subprocess.CompletedProcess[str]]:
    done = on_ranks(PROGRAM, *words, num_ranks=num_ranks)
    assert all(one.returncode == 0 for one in done), done[0].stderr[-3000:]
    return done


def test_it_trains_evaluates_resumes_exports_and_plans(recipe: Path) -> None:
    folder = recipe.parent / "run"
    run("train", "--ds", "zero2", "--recipe", str(recipe), num_ranks=2)
    losses = [json.loads(line)["loss"] for line in (folder / "receipt.jsonl").read_text().splitlines()[1:]]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STEPS
    assert set(checkpoint.weight_shapes()) == {"projector.weight", "projector.bias"}
    assert checkpoint.belongs_to["model"]["architecture"] == "projector"
    assert (folder / "eval" / "val" / "metrics.json").is_file()
    told = run("train", "--ds", "zero2", "--recipe", str(recipe))[0]  # nothing is left to do
    assert f"{STEPS} of {STEPS} steps done" in told.stdout + told.stderr
    run("evaluate", str(folder))
    assert json.loads((folder / "eval" / "test" / "metrics.json").read_text())["total"] == 6
    planned = recipe.parent / "plan.json"
    run("plan", str(recipe), "--json", str(planned))
    plan = json.loads(planned.read_text())
    assert plan["parameters"]["projector"]["trainable"] == 33 * 32 == plan["parameters"]["all"]["trainable"]
    run("export", str(folder), "--output", str(recipe.parent / "exported"), "--proof", "none")


def test_its_keys_are_its_own(recipe: Path) -> None:
    [done] = on_ranks(PROGRAM, "plan", str(recipe), "--model.neck.dim", "8", num_ranks=1)
    assert done.returncode == 2
    told = "model.neck.dim: has no effect: it is of the architecture mmt, and model.architecture is projector"
    assert told in done.stderr
