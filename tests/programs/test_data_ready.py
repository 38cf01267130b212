"""Samples that are there already are taken as they are, unless the recipe asks for others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vltrain.config import Config, DataConfig
from vltrain.errors import InputError
from vltrain.programs.data_ready import ready_samples

PROBLEM = {
    "question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "H", "image": None, "grade": "grade2", "subject": "s", "lecture": "L", "solution": "E",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    options = {"prompt_format": "QCM-A"}
    return Config(data=DataConfig(source="scienceqa", input=str(tmp_path), root=str(tmp_path / "data"), options=options))


def asking(config: Config, **options: str) -> Config:
    return replace(config, data=replace(config.data, options=options))


def test_samples_of_another_option_are_refused(config):
    file = ready_samples(config, "train")
    before = file.read_bytes()
    assert ready_samples(config, "train") == ready_samples(asking(config), "train") == file
    assert ready_samples(asking(config, prompt_format="QCM-A", missing_images="error"), "train").read_bytes() == before
    with pytest.raises(InputError, match="prompt_format = QCM-A, the recipe says QCM-ALE.*another data.root"):
        ready_samples(asking(config, prompt_format="QCM-ALE"), "train")


def test_samples_of_other_makers_are_taken_as_they_are(config):
    file = ready_samples(config, "train")
    (file.parent / "prepared.json").unlink()
    assert ready_samples(asking(config, prompt_format="QCM-ALE"), "train") == file
