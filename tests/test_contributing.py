"""The recipes of .github/CONTRIBUTING.md: each diff is applied to a copy of this tree, where what it adds is used."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.support.processes import free_port, rank_environment
from tests.support.tiny import make_segments, write_packs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
RECIPES = {
    title.removeprefix("A ").removeprefix("An "): diff
    for title, diff in re.findall(r"^### (.*?)\n.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
COPIED = ("vltrain", "data_prep", "launch", "ds_configs", "tests/support", "tests/train")
STEPS = 4
LOGGED = """
import sys
from pathlib import Path
from vltrain.config.recipe import build_config
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import open_loggers

names = build_config({"train.loggers": ["csv"]}).train.loggers
loggers = open_loggers(names, RunContext(folder=Path(sys.argv[1]), settings={}))
loggers.scalars({"train/loss": 0.5, "train/lr": 0.1}, 1)
loggers.scalars({"train/loss": 0.25}, 2)
loggers.text("eval/val/table", "| a |", 2)
loggers.close()
"""

OF_SEED_OSS = """
import sys, torch
from transformers import SeedOssConfig, SeedOssForCausalLM
from tests.support.tiny import tiny_config
from vltrain.models.build import build_model

sizes = tiny_config().model.llm.config
SeedOssForCausalLM(SeedOssConfig(**sizes)).save_pretrained(sys.argv[1])
for where in ({"model__llm__config": {"model_type": "seed_oss", **sizes}},
              {"model__llm__config": {}, "model__llm__source": sys.argv[1]}):
    llm = build_model(tiny_config(**where).model).llm
    assert type(llm) is SeedOssForCausalLM and llm.model.layers[0].self_attn.q_proj.bias is not None
    assert hasattr(llm.model.layers[0].input_layernorm, "adapter")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy with all recipes applied, one after the other, each as it stands in the page."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, tree / folder)
    for file in ("pyproject.toml", "setup.cfg", "tests/__init__.py"):
        shutil.copy2(ROOT / file, tree / file)
    for name, diff in RECIPES.items():
        (tree / "recipe.diff").write_text(diff)
        # Outside of any repository, so that the copy's own folder is what it names files from.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
        done = subprocess.run(
            ["git", "apply", "recipe.diff"], cwd=tree, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
    return tree


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**rank_environment(0, 1, free_port()), "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory) -> dict[str, Path]:
    """Runs of the tiny recipe with what the recipes add, in one process of the copy."""
    folder = tmp_path_factory.mktemp("runs")
    packs = write_packs(folder / "packs", make_segments(8))
    common = {"train__max_steps": STEPS, "train__epochs": 50.0, "train__packs_per_step": 2, "train__log_every_steps": 1}
    scenarios = {
        # 16 is the default: the kind has no such setting
        "adapter": {"model__adapter__kind": "gain", "model__adapter__dim": 16},
    }
    told = [
        {
            "packs": str(packs),
            "output": str(folder / name),
            "ds": {"zero_optimization": {"stage": 0}},
            "changes": {**common, **changes},
        }
        for name, changes in scenarios.items()
    ]
    (folder / "scenarios.json").write_text(json.dumps(told))
    run = "import sys; from tests.train.worker import main; main(sys.argv[1])"
    python(tree, "-c", run, str(folder / "scenarios.json"))
    return {name: folder / name for name in scenarios}


def test_each_recipe_is_a_file_and_its_line():
    assert list(RECIPES) == ["adapter", "architecture", "backbone", "data source", "logger"]
    for name, diff in RECIPES.items():
        # An architecture: its section and its folder of two; and beside its line the folder's among the packages.
        num_new, num_lines = (3, 2) if name == "architecture" else (1, 1)
        assert len(re.findall("^new file mode", diff, re.MULTILINE)) == num_new
        changed = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
        assert len(changed) == num_new + num_lines, changed
        assert not re.findall(r"^-(?!-- )", diff, re.MULTILINE), "nothing is taken away"


def test_ruff_accepts_the_tree(tree):
    changed = [path for diff in RECIPES.values() for path in re.findall(r"^\+\+\+ b/(.*\.py)$", diff, re.MULTILINE)]
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([ruff, *command, *changed], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_adapter_trains(trained):
    result = load_file(trained["adapter"] / "result.safetensors")
    gains = {name: value for name, value in result.items() if name.startswith("weight/") and name.endswith(".gain")}
    assert len(gains) == 6, (
        "one behind each attention norm: four blocks of the ViT, up to its last tap, and two of the LLM"
    )
    assert all(value.abs().max() > 0 for value in gains.values()), "they began at zero"
    assert result["losses"].isfinite().all()


def test_an_architecture_is_planned(tree, tmp_path):
    """That programs train, evaluate, resume and export it: `tests/programs/test_third_architecture.py`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    projector = {"vision": {**sizes, "image_size": 32, "patch_size": 8}, "llm": {**sizes, "vocab_size": 768}}
    recipe = {"model": {"architecture": "projector", "projector": projector}, "output": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    python(tree, "-m", "vltrain", "plan", str(tmp_path / "recipe.yaml"), "--json", str(tmp_path / "plan.json"))
    parameters = json.loads((tmp_path / "plan.json").read_text())["parameters"]
    assert parameters["projector"]["trainable"] == parameters["all"]["trainable"] == 33 * 32


def test_a_backbone_is_built_from_sizes_and_read_from_its_folder(tree, tmp_path):
    python(tree, "-c", OF_SEED_OSS, str(tmp_path))


def test_a_source_is_prepared(tree, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = "image,question,answer\na.png,what color is it?,red\na.png,is <image> red?,yes\n"
    (tmp_path / "questions.csv").write_text(rows)
    prepare = ("-m", "vltrain", "prepare", "--source", "csv_vqa", "--input", str(tmp_path / "questions.csv"))
    python(tree, *prepare, "--output", str(tmp_path / "samples"))
    samples = [json.loads(line) for line in (tmp_path / "samples" / "train.jsonl").read_text().splitlines()]
    assert [sample["turns"][0]["text"] for sample in samples] == [
        "<image>\nQuestion: what color is it?\nAnswer:",
        "<image>\nQuestion: is <\\image> red?\nAnswer:",
    ]
    assert [sample["turns"][1]["text"] for sample in samples] == ["red", "yes"]
    assert (tmp_path / "samples" / samples[0]["images"][0]).read_bytes() == (tmp_path / "a.png").read_bytes()


def test_a_logger_gets_the_numbers(tree, tmp_path):
    python(tree, "-c", LOGGED, str(tmp_path))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["1", "train/loss", "0.5"],
            ["1", "train/lr", "0.1"],
            ["2", "train/loss", "0.25"],
        ]


@pytest.mark.slow
def test_pyright_accepts_the_tree(tree):
    """Beside the findings that the baseline names."""
    shutil.copytree(ROOT / ".basedpyright", tree / ".basedpyright")
    shutil.copytree(ROOT / "tests" / "typings", tree / "tests" / "typings")
    (tree / ".venv").symlink_to(Path(sys.prefix))
    done = subprocess.run(
        [Path(sys.executable).with_name("basedpyright"), "--baselinemode=discard"],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
