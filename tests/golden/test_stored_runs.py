"""Runs that an earlier commit left (see `tests.golden.stored_runs`) go on, are verified, answer, and begin others, as
they did by its code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.stored_runs import NAMES, SAVED, STEPS, STORED, batch_digests, digest, machine
from tests.support.processes import vltrain
from vltrain.models.build import build_model
from vltrain.train.checkpoints.checkpoint import load_trainable
from vltrain.train.run.adapters_folder import open_adapters

TOLERANCE = 1e-5  # of losses, on another CPU than theirs


@pytest.fixture(scope="module", params=NAMES)
def place(request, tmp_path_factory):
    return Path(shutil.copytree(STORED / request.param, tmp_path_factory.mktemp("stored") / request.param))


@pytest.fixture(scope="module")
def resumed(place):
    """The run, as it was killed two steps after its checkpoint, and gone on with to its end."""
    for file, head in (("log.jsonl", 0), ("receipt.jsonl", 1)):
        lines = (place / "run" / file).read_text().splitlines(keepends=True)
        assert len(lines) == head + STEPS
        (place / "run" / file).write_text("".join(lines[: head + SAVED + 2]))
    shutil.rmtree(place / "run" / "eval")
    done = vltrain("train", "--recipe", "recipe.yaml", folder=place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"from step {SAVED}," in done.stderr
    return place / "run"


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_goes_on_as_it_would_have(place, resumed):
    """On the CPU and the torch that made it bit for bit."""
    stored = STORED / place.name / "run"
    if machine() == json.loads((place / "machine.json").read_text()):
        for name in ("log.jsonl", "eval/test/predictions.jsonl"):
            assert (resumed / name).read_bytes() == (stored / name).read_bytes()
        losses = [[line["loss"] for line in lines_of(run / "receipt.jsonl")[1:]] for run in (resumed, stored)]
        assert losses[0] == losses[1]
    for found, expected in zip(lines_of(resumed / "log.jsonl"), lines_of(stored / "log.jsonl"), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    header, *steps = lines_of(resumed / "receipt.jsonl")
    expected_header, *expected_steps = lines_of(stored / "receipt.jsonl")
    assert header == expected_header
    for found, expected in zip(steps, expected_steps, strict=True):
        assert [found[name] for name in ("step", "samples", "label_tokens")] == [
            expected[name] for name in ("step", "samples", "label_tokens")
        ]
    identities = [
        json.loads((run / "checkpoints" / f"step-{SAVED:08d}" / "checkpoint.json").read_text())["belongs_to"]
        for run in (resumed, stored)
    ]
    assert identities[0] == identities[1]


def test_its_receipt_is_verified(resumed):
    done = vltrain("check", "resume", "run", folder=resumed.parent)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"chain: {STEPS} of {STEPS} steps, each once and in order" in done.stdout
    assert f"losses from step {SAVED} on (of earlier ones it has none)" in done.stdout
    assert f"as at step {SAVED + 1} at each of" in done.stdout


def test_its_packs_are_read_to_the_same_batches(place, monkeypatch):
    monkeypatch.chdir(place)
    stored = json.loads(Path("batches.json").read_text())
    found = batch_digests(Path("run"))
    # What batches have got since is of other architectures, and empty here.
    assert {name for one in found for name in one} - {name for one in stored for name in one} == {"blocks"}
    assert {one.pop("blocks") for one in found} == {digest(torch.empty(0, dtype=torch.int64))}
    assert found == stored


def test_its_checkpoint_is_exported_as_it_was(place, tmp_path):
    words = ("--format", "adapters", "--checkpoint", f"run/checkpoints/step-{SAVED:08d}", "--proof", "none")
    done = vltrain("export", "run", "--output", str(tmp_path / "adapters"), *words, folder=place)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("weights-00001.safetensors", "checkpoint.json"):
        assert (tmp_path / "adapters" / name).read_bytes() == (place / "adapters" / name).read_bytes(), name
    configs = [open_adapters(folder)[0] for folder in (tmp_path / "adapters", place / "adapters")]
    assert configs[0] == configs[1]


def test_another_run_begins_with_its_exported_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    config, checkpoint = open_adapters(Path("adapters"))
    model = build_model(config.model)
    load_trainable(model, checkpoint)
    stored, found = load_file("adapters/weights-00001.safetensors"), dict(model.named_parameters())
    assert stored.keys() == {name for name, one in found.items() if one.requires_grad}
    assert all(found[name].equal(value) for name, value in stored.items())
