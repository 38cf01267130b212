"""Samples that are there already are used if they were made from what the recipe names, and else refused or made anew;
older ones are adopted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vltrain.config.schema import Config, DataConfig
from vltrain.errors import InputError
from vltrain.prepared.ensure_data import ensure_samples

PROBLEM = {
    "question": "Q?",
    "choices": ["x", "y"],
    "answer": 1,
    "hint": "H",
    "image": None,
    "grade": "grade2",
    "subject": "s",
    "lecture": "L",
    "solution": "E",
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    options = {"prompt_format": "QCM-A"}
    return Config(
        data=DataConfig(source="scienceqa", input=str(tmp_path), root=str(tmp_path / "data"), options=options)
    )


def asking(config: Config, **options: str) -> Config:
    return replace(config, data=replace(config.data, options=options))


def test_samples_of_another_option_are_refused_and_made_anew_on_request(config):
    file = ensure_samples(config, "train")
    before = file.read_bytes()
    assert ensure_samples(asking(config, prompt_format="QCM-A", missing_images="error"), "train").read_bytes() == before
    for other, said in (({"prompt_format": "QCM-AE"}, "is QCM-AE"), ({}, r"is QCM-ALE \(its default\)")):
        with pytest.raises(
            InputError, match=f"data.options.prompt_format was QCM-A, {said}.*--rebuild.*another data.root"
        ):
            ensure_samples(asking(config, **other), "train")
        assert file.read_bytes() == before
    assert ensure_samples(asking(config), "train", rebuild=True).read_bytes() != before
    assert "BECAUSE" in file.read_text()


def test_what_matches_is_not_made_anew(config):
    file = ensure_samples(config, "train")
    before = file.stat()
    assert ensure_samples(config, "train", rebuild=True).stat() == before


def test_samples_without_a_record_are_taken_told_and_watched_from_then_on(config, caplog):
    file = ensure_samples(config, "train")
    for path in file.parent.glob("prepared*"):
        path.unlink()
    assert ensure_samples(asking(config, prompt_format="QCM-ALE"), "train") == file
    assert "no record of what they were made from" in caplog.text
    file.write_text(file.read_text().replace("Q?", "R?"))
    with pytest.raises(InputError, match="train.jsonl differs"):
        ensure_samples(config, "train")


def test_an_older_record_says_what_it_can(config, caplog):
    file = ensure_samples(config, "train")
    for path in file.parent.glob("prepared*"):
        path.unlink()
    (file.parent / "prepared.json").write_text(
        json.dumps({"source": "scienceqa", "options": {"prompt_format": "QCM-A"}})
    )
    with pytest.raises(InputError, match="prompt_format was QCM-A"):
        ensure_samples(asking(config), "train")
    assert ensure_samples(config, "train") == file and "used as they are" in caplog.text
    assert ensure_samples(config, "train", rebuild=True) == file
    caplog.clear()
    ensure_samples(config, "train")
    assert not caplog.text
