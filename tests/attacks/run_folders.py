"""Runs' folders that are another than they say, runs that begin with another's weights, and the machine below them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest import mock

from tests.attacks.attack import Shown, attack, refused, refuses, right
from tests.attacks.runs import NOBODY, as_nobody, evaluate_words, fails_check, other_weights, rewrite, train_words
from tests.support.finished_run import finished_run, write_run
from vltrain.distributed.hardware import PRECISIONS
from vltrain.errors import InputError
from vltrain.files.appended import AppendedFile
from vltrain.files.atomic import write_whole
from vltrain.train.checkpoints.selection import BestTracker, measured_by
from vltrain.train.run.provenance import make_run_folder

MACHINE = "permissions and full disks"

BEGIN = "a new run that begins with another's weights"

OTHERWISE = "a run's folder that says one thing and is another"

# A folder that is another


@attack(OTHERWISE)
def edited_recipe(folder: Path) -> Shown:
    """Which of the ViT's states are read was edited in the run's config.yaml: the same shapes, another model."""
    places = finished_run(folder)
    stored = places.run / "config.yaml"
    stored.write_text(stored.read_text().replace("tap_every: 1", "tap_every: 2"))
    return refused(evaluate_words(places), "model.vision.tap_every was 1, is 2")


@attack(OTHERWISE)
def half_a_run_json(folder: Path) -> Shown:
    """run.json was cut off by a full disk."""
    places = finished_run(folder)
    (places.run / "run.json").write_text((places.run / "run.json").read_text()[:200])
    return refused(evaluate_words(places, "--checkpoint", "none"), "run.json")


@attack(OTHERWISE)
def run_json_of_another_type(folder: Path) -> Shown:
    """run.json's identity is a list."""
    places = finished_run(folder)
    (places.run / "run.json").write_text('{"identity": [1]}')
    return refused(evaluate_words(places, "--checkpoint", "none"), "run.json: identity: found [1]")


@attack(OTHERWISE)
def foreign_checkpoint(folder: Path) -> Shown:
    """Another run's checkpoint was copied in: the same shapes, trained with dropout."""
    places = finished_run(folder)
    other = finished_run(_new(folder / "other"))
    shutil.rmtree(other.run)
    write_run(other, model__adapter__dropout=0.5)
    shutil.rmtree(places.checkpoint(4))
    shutil.copytree(other.checkpoint(4), places.checkpoint(4))
    return refused(evaluate_words(places), "step-00000004", "model.adapter.dropout was 0.5, is 0.0")


@attack(OTHERWISE)
def foreign_receipt(folder: Path) -> Shown:
    """Another run's receipt was copied in."""
    places = finished_run(folder)
    other = finished_run(_new(folder / "other"))
    shutil.rmtree(other.run)
    write_run(other, optim__lr=1e-5)
    shutil.copy(other.run / "receipt.jsonl", places.run / "receipt.jsonl")
    return fails_check(["check", "resume", places.run, "--packs", folder / "packs"], "receipt of another run")


@attack(OTHERWISE)
def cut_receipt(folder: Path) -> Shown:
    """The last line of a finished run's receipt is gone, its chain whole."""
    places = finished_run(folder)
    lines = (places.run / "receipt.jsonl").read_text().splitlines(keepends=True)
    (places.run / "receipt.jsonl").write_text("".join(lines[:-1]))
    return fails_check(["check", "resume", places.run, "--packs", folder / "packs"], "steps 0 to 3", "has 4 behind it")


@attack(OTHERWISE)
def put_back_checkpoint(folder: Path) -> Shown:
    """The newest checkpoints were removed: the receipt goes on for longer than a run does between two saves."""
    places = finished_run(folder)
    stored = places.run / "config.yaml"
    stored.write_text(stored.read_text().replace("save_every_steps: 2", "save_every_steps: 1"))
    shutil.rmtree(places.checkpoint(4))
    return fails_check(
        ["check", "resume", places.run, "--packs", folder / "packs"], "newest usable checkpoint is of step 2"
    )


@attack(OTHERWISE)
def output_is_a_file(folder: Path) -> Shown:
    """The run's folder is a file."""
    places = finished_run(folder)
    (folder / "file").write_text("notes")
    return refused(train_words(places, "--output", folder / "file"), "file", "cannot be written", untouched=folder)


@attack(OTHERWISE)
def output_is_a_broken_link(folder: Path) -> Shown:
    """The run's folder is a link that leads nowhere."""
    places = finished_run(folder)
    (folder / "link").symlink_to(folder / "not mounted")
    return refused(train_words(places, "--output", folder / "link"), "link", "cannot be written", untouched=folder)


@attack(OTHERWISE)
def no_recipe(folder: Path) -> Shown:
    """A run's folder without its recipe."""
    places = finished_run(folder)
    (places.run / "config.yaml").unlink()
    return refused(evaluate_words(places), "no config.yaml in it")


@attack(OTHERWISE)
def older_run_goes_on(folder: Path) -> Shown:
    """A run of a version that knew no `model.vision.preprocessing`, goes on as it was, and once more."""
    places = finished_run(folder)
    lines = [line for line in places.recipe.read_text().splitlines() if "preprocessing" not in line]
    places.recipe.write_text("\n".join(lines))
    manifest = json.loads((places.checkpoint() / "checkpoint.json").read_text())
    identity = manifest["belongs_to"]
    for before in ({}, {"preprocessing": "square"}):
        identity["model"]["vision"].pop("preprocessing", None)
        identity["model"]["vision"].update(before)
        rewrite(places.checkpoint(), belongs_to=identity)
        with mock.patch("vltrain.programs.train.init_distributed", side_effect=InputError("this run goes on")):
            refused(train_words(places), "this run goes on")
    return refused(
        train_words(places, "--model.vision.preprocessing", "checkpoint"),
        "model.vision.preprocessing was 'square', is 'checkpoint'",
    )


@attack(OTHERWISE)
def another_machines_precision(folder: Path) -> Shown:
    """A run with `train.precision: auto`, begun where bf16 is fast, goes on where it is not, and the other way
    round."""
    places = finished_run(folder)
    places.recipe.write_text(places.recipe.read_text().replace("precision: fp32", "precision: auto"))
    manifest = json.loads((places.checkpoint() / "checkpoint.json").read_text())
    manifest["belongs_to"]["train"]["precision"] = "auto"
    for begun, fast in (("bf16", False), ("fp32", True)):
        rewrite(
            places.checkpoint(),
            belongs_to=manifest["belongs_to"],
            run_state={**manifest["run_state"], "precision": begun},
        )
        computed = []
        with (
            mock.patch("vltrain.distributed.hardware.cpu_has_fast_bf16", lambda fast=fast: fast),
            mock.patch("vltrain.programs.train.init_distributed", return_value=(0, 1)),
            mock.patch("vltrain.programs.train.agreed_over_nodes", lambda files: files),
            mock.patch(
                "vltrain.programs.train.build_model",
                side_effect=lambda *_, dtype, **__: computed.append(dtype) or _stop(),
            ),
        ):
            refused(train_words(places), "this run goes on")
        assert computed == [PRECISIONS[begun]], computed
    return right("what the run began in, on either machine")


def _stop() -> None:
    raise InputError("this run goes on")


@attack(OTHERWISE)
def figures_of_another_kind(folder: Path) -> Shown:
    """The best checkpoint was chosen by other questions, or another scorer, than those of the evaluations to come."""
    places = finished_run(folder)
    state = json.loads((places.checkpoint() / "checkpoint.json").read_text())["run_state"]
    chosen = BestTracker(best=0.5, best_step=2, measured_by={**measured_by(places.config()), "eval.max_samples": 2})
    rewrite(places.checkpoint(), run_state={**state, "selection": chosen.state()})
    refused(
        train_words(places, "--train.early_stopping_patience", 3, "--train.eval_every_steps", 2),
        "eval.max_samples was 2, is 512",
    )
    anew = BestTracker(measured_by=measured_by(places.config()))
    anew.load(chosen.state())
    assert anew.best is None, "a figure of two questions is held against one of all"
    return refused(
        train_words(places, "--train.keep_best", "true", "--train.eval_every_steps", 2),
        "train.keep_best",
        "eval.max_samples was 2, is 512",
        "go on without both",
    )


# Beginning with another run's weights


@attack(BEGIN)
def other_settings_after_the_end(folder: Path) -> Shown:
    """A finished run is resumed with another learning rate and more epochs."""
    places = finished_run(folder)
    words = train_words(places, "--optim.lr", 1e-5, "--train.epochs", 3)
    return refused(
        words, "optim.lr was", "train.epochs was 2.0, is 3.0", "--train.init_from", untouched=places.run / "checkpoints"
    )


@attack(BEGIN)
def of_itself(folder: Path) -> Shown:
    """A run that is to begin with itself."""
    places = finished_run(folder)
    return refused(
        train_words(
            places, "--train.init_from", places.run, "--output", places.run / "checkpoints" / ".." / ".." / "run"
        ),
        "init_from",
    )


@attack(BEGIN)
def of_nothing(folder: Path) -> Shown:
    """A folder that is not there, beside an output that is new."""
    places = finished_run(folder)
    return refused(
        train_words(places, "--train.init_from", folder / "nowhere", "--output", folder / "new"),
        "train.init_from",
        "no such folder",
    )


@attack(BEGIN)
def of_a_folder_of_peft(folder: Path) -> Shown:
    """A folder of peft's that is no run's: what an InstructBLIP may begin with, this model may not."""
    places = finished_run(folder)
    _new(folder / "peft").joinpath("adapter_config.json").write_text("{}")
    return refused(
        train_words(places, "--train.init_from", folder / "peft", "--output", folder / "new"), "another architecture's"
    )


@attack(BEGIN)
def of_damaged_weights(folder: Path) -> Shown:
    """A run whose best checkpoint is damaged: the newest is not taken in its place."""
    places = finished_run(folder)
    (places.run / "checkpoints" / "best").write_text("step-00000002\n")
    weights = places.checkpoint(2) / "weights-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return refused(
        train_words(places, "--train.init_from", places.run, "--output", folder / "new"), "step-00000002", "damaged"
    )


@attack(BEGIN)
def of_another_shape(folder: Path) -> Shown:
    """Adapters of another width."""
    places = finished_run(folder)
    words = train_words(places, "--train.init_from", places.run, "--output", folder / "new", "--model.adapter.dim", 8)
    return refused(words, "do not fit", "adapter", "has the shape")


@attack(BEGIN)
def over_other_frozen_weights(folder: Path) -> Shown:
    """The same shapes over another LLM."""
    places = finished_run(folder)
    shutil.copytree(places.llama, folder / "another")
    other_weights(folder / "another")
    words = train_words(
        places, "--train.init_from", places.run, "--output", folder / "new", "--model.llm.source", folder / "another"
    )
    return refused(words, "other frozen weights", "model.llm.source", "has changed")


# The machine


@attack(MACHINE)
def full_disk_under_a_log(folder: Path) -> Shown:
    """The disk is full when a step's line is written."""
    return refuses(
        lambda: AppendedFile(Path("/dev/full")).write("line\n"),
        "/dev/full: cannot be written (No space left on device)",
    )


@attack(MACHINE)
@as_nobody
def read_only_run(folder: Path) -> Shown:
    """A run's folder in which this user may not write."""
    places = finished_run(folder)
    os.seteuid(NOBODY)
    return refuses(lambda: make_run_folder(places.run), "run folder", "cannot be written (Permission denied)")


@attack(MACHINE)
@as_nobody
def forbidden_file(folder: Path) -> Shown:
    """One file of the run may not be replaced, since its folder belongs to another user."""
    places = finished_run(folder)
    os.seteuid(NOBODY)
    return refuses(
        lambda: write_whole(places.run / "run.json", "{}"), "run.json: could not be written (Permission denied)"
    )


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
