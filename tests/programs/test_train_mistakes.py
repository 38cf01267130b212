"""Each mistake ends `vltrain train` with one line on stderr and exit code 2, before any training and with nothing half
written."""

import json
from pathlib import Path

import pytest
import yaml

from data_prep.tokenizer import train_tokenizer
from tests.support.tiny import SETTINGS, make_segments, write_packs
from vltrain.metrics.wandb import WandbLogger
from vltrain.programs import check, submit
from vltrain.programs.train import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("is there a red circle? yes\nwhat colour is the square? blue\n" * 20)
    train_tokenizer([text], 290, folder / "made")
    return folder / "made"


@pytest.fixture
def recipe(tmp_path, tokenizer):
    """A tiny recipe as a file; call it with dotted changes."""

    def make(**changes) -> list[str]:
        nested: dict = {}
        own = {
            "model.llm.tokenizer": str(tokenizer),
            "output": str(tmp_path / "run"),
            "data.root": str(tmp_path / "data"),
            "model.llm.config": {**SETTINGS["model.llm.config"], "vocab_size": 300},
        }
        for key, value in {
            **SETTINGS,
            **own,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }.items():
            *sections, last = key.split(".")
            section = nested
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(nested))
        return ["--recipe", str(file)]

    return make


def test_a_logger_whose_package_is_missing(recipe, capsys, monkeypatch):
    monkeypatch.setattr(WandbLogger, "package", "no_such_package")
    said = mistake(capsys, recipe(train__loggers=["tensorboard", "wandb"]))
    assert "train.loggers: wandb needs the package no_such_package" in said and "pip install 'vltrain[wandb]'" in said


def mistake(capsys, arguments: list[str]) -> str:
    """Runs the program, which must refuse; returns what it said."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "Traceback" not in said
    return line


def test_unknown_key_names_the_nearest(recipe, capsys, tmp_path):
    assert "model.adapter.dim" in mistake(capsys, [*recipe(), "--model.adapter.dimm", "8"])
    assert "did you mean 'optim.lr'" in mistake(capsys, recipe(optim__lrr=1.0))
    assert not (tmp_path / "run").exists()


def test_a_row_that_is_not_trained_says_how_it_is_answered(capsys):
    row = "qformer_easyvqa#base"
    for program, words in ((main, ["--recipe", row]), (submit.main, ["--recipe", row]), (check.main, ["recipe", row])):
        assert program(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "qformer_easyvqa.yaml#base: 'base' is listed under ablation.untuned" in said
        assert "vltrain ablate " in said and "qformer_easyvqa.yaml --only base" in said


def test_dim_not_divisible_by_groups(recipe, capsys, tmp_path):
    line = mistake(capsys, recipe(model__adapter__dim=6, model__adapter__groups=4))
    assert "model.adapter.groups" in line and "model.adapter.dim = 6" in line
    assert not (tmp_path / "run").exists()


def test_width_not_divisible_by_groups(recipe, capsys):
    line = mistake(capsys, recipe(model__adapter__dim=15, model__adapter__groups=5))
    assert "32" in line and "5" in line


def test_recipe_and_deepspeed_json_in_conflict(recipe, capsys, tmp_path):
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"gradient_clipping": 1.0}))
    line = mistake(capsys, [*recipe(), "--ds", str(ds)])
    assert "gradient_clipping" in line and "optim.clip" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


def test_output_that_cannot_be_written(recipe, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = mistake(capsys, [*recipe(), "--output", str(tmp_path / "file" / "run")])
    assert "cannot be written" in line and "--output" in line


def test_packs_of_another_tokenizer(recipe, capsys, tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(4))
    line = mistake(capsys, recipe(data__train_packs=str(packs)))
    assert "tokenizer_fingerprint" in line and "pack" in line


def test_packs_for_another_number_of_visual_tokens(recipe, capsys, tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(4))
    line = mistake(capsys, recipe(data__train_packs=str(packs), model__vision__tap_every=1))
    assert "visual_tokens is 2" in line and "5" in line


def test_damaged_packs(recipe, capsys, tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(4))
    shard = next(packs.glob("packs-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = mistake(capsys, recipe(data__train_packs=str(packs)))
    assert shard.name in line and "SHA-256" in line


def test_a_tokenizer_larger_than_the_embedding(recipe, capsys):
    line = mistake(capsys, recipe(model__llm__config={**SETTINGS["model.llm.config"], "vocab_size": 280}))
    assert "290" in line and "280" in line


def test_never_resume_does_not_overwrite_a_run(recipe, capsys, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert "--resume auto" in mistake(capsys, [*recipe(), "--resume", "never"])


def test_a_named_checkpoint_that_is_none(recipe, capsys, tmp_path):
    assert "not a complete checkpoint" in mistake(capsys, [*recipe(), "--resume", str(tmp_path)])
