"""Attacks on a run's folder: checkpoints that cannot be read, weights that changed, folders that say one thing and are
another."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from safetensors.torch import load_file, save_file

from tests.attacks.attack import AttackFailed, Shown, attack, refused, refuses, right, run_vltrain
from tests.support.finished_run import Places, finished_run, write_run
from vltrain.config.command_line import split_arguments
from vltrain.distributed.hardware import PRECISIONS
from vltrain.errors import InputError
from vltrain.files.atomic import write_whole
from vltrain.files.lines import LineFile
from vltrain.inference.run import weights_used
from vltrain.programs.studies.ablate import make_plan
from vltrain.programs.studies.table import DONE, Outcome, write_outcome
from vltrain.receipts.manifest import dumps
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.checkpoints.selection import Selection, measured_by
from vltrain.train.run.made_of import made_of
from vltrain.train.run.provenance import make_run_folder

UNREADABLE = "checkpoints that are there and cannot be used"
CHANGED = "weights or tokenizer that are not the run's any more"
OTHERWISE = "a run's folder that says one thing and is another"
BEGIN = "a new run that begins with another's weights"
MACHINE = "permissions and full disks"
NOBODY = 65534


def train_words(places: Places, *more: Any) -> list[Any]:
    return ["train", "--recipe", places.recipe, *more]


def evaluate_words(places: Places, *more: Any) -> list[Any]:
    return ["evaluate", places.run, *more]


def fails_check(words: list[Any], *needles: str) -> Shown:
    """`vltrain check ...` must end with exit code 1 and a FAILED line that holds every needle."""
    code, output = run_vltrain(words)
    lines = [
        line for line in output.splitlines() if line.startswith("FAILED") and all(needle in line for needle in needles)
    ]
    if code != 1 or not lines:
        raise AttackFailed("silent" if code == 0 else "unclear", f"exit code {code}; {output[-400:]}")
    return Shown("refused", lines[0])


def rewrite(checkpoint: Path, **changes: Any) -> None:
    """Changes a manifest and makes its checksum fit."""
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    del manifest["sha256"]
    (checkpoint / "checkpoint.json").write_text(dumps({**manifest, **changes}))


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"})


def as_nobody(call: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Calls it as a user who owns nothing, with a folder that this user reaches; root may read and write everything."""

    def called(_: Path) -> Any:
        with tempfile.TemporaryDirectory() as outer:
            os.chmod(outer, 0o755)
            is_root = os.geteuid() == 0
            try:
                return call(Path(outer))
            finally:
                if is_root:
                    os.seteuid(0)

    called.__name__, called.__doc__, called.__module__ = call.__name__, call.__doc__, call.__module__
    return called


# Checkpoints


@attack(UNREADABLE)
def newer_format(folder: Path) -> Shown:
    """All checkpoints are of a newer version's format."""
    places = finished_run(folder)
    for step in (2, 4):
        rewrite(places.checkpoint(step), format=2)
    return refused(
        train_words(places),
        "none of its checkpoints can be used",
        "checkpoint format 2",
        "step-00000002",
        untouched=places.run,
    )


@attack(UNREADABLE)
def link_elsewhere(folder: Path) -> Shown:
    """The only checkpoint is a link that leads out of the run's folder."""
    places = finished_run(folder)
    shutil.rmtree(places.checkpoint(2))
    places.checkpoint(4).rename(folder / "elsewhere")
    places.checkpoint(4).symlink_to(folder / "elsewhere")
    return refused(train_words(places), "step-00000004: a link", untouched=places.run)


@attack(UNREADABLE)
def checkpoints_is_a_file(folder: Path) -> Shown:
    """The folder of checkpoints was replaced by a file that says where they went."""
    places = finished_run(folder)
    shutil.rmtree(places.run / "checkpoints")
    (places.run / "checkpoints").write_text("moved to tape")
    return refused(train_words(places), "checkpoints: cannot be read (Not a directory)", untouched=places.run)


@attack(UNREADABLE)
def checkpoints_link_leads_nowhere(folder: Path) -> Shown:
    """`checkpoints` is a link to a disk that is not mounted."""
    places = finished_run(folder)
    shutil.rmtree(places.run / "checkpoints")
    (places.run / "checkpoints").symlink_to(folder / "not mounted")
    return refused(train_words(places), "checkpoints: cannot be read", untouched=places.run)


@attack(UNREADABLE)
def latest_of_nothing(folder: Path) -> Shown:
    """`latest` is there, and the checkpoints were moved away."""
    places = finished_run(folder)
    for step in (2, 4):
        shutil.rmtree(places.checkpoint(step))
    return refused(train_words(places), "latest: names step-00000004, which is not there", untouched=places.run)


@attack(UNREADABLE)
def renamed_checkpoint(folder: Path) -> Shown:
    """A checkpoint of step 2 that is called by another step."""
    places = finished_run(folder)
    shutil.rmtree(places.checkpoint(4))
    places.checkpoint(2).rename(places.checkpoint(4))
    return refused(train_words(places), "says step 2, the folder is named 4", untouched=places.run)


@attack(UNREADABLE)
def named_pipe(folder: Path) -> Shown:
    """A manifest that is a named pipe: reading it would wait for ever."""
    places = finished_run(folder)
    shutil.rmtree(places.checkpoint(2))
    (places.checkpoint(4) / "checkpoint.json").unlink()
    os.mkfifo(places.checkpoint(4) / "checkpoint.json")
    return refused(evaluate_words(places), "step-00000004", "no plain file", untouched=places.run)


@attack(UNREADABLE)
def only_copies(folder: Path) -> Shown:
    """Checkpoints that someone has renamed by hand, so that none has a step's name."""
    places = finished_run(folder)
    shutil.rmtree(places.checkpoint(2))
    places.checkpoint(4).rename(places.run / "checkpoints" / "step-4-good")
    (places.run / "checkpoints" / "latest").unlink()
    return refused(train_words(places), "step-4-good: not named by its step", untouched=places.run)


@attack(UNREADABLE)
@as_nobody
def forbidden_checkpoint(folder: Path) -> Shown:
    """Checkpoints whose files this user may not read."""
    places = finished_run(folder)
    for path in (places.run / "checkpoints").rglob("*"):
        path.chmod(0)
    os.seteuid(NOBODY)
    return refuses(
        lambda: newest_checkpoint(places.run / "checkpoints"), "none of its checkpoints can be used", "PermissionError"
    )


@attack(UNREADABLE)
@as_nobody
def forbidden_folder(folder: Path) -> Shown:
    """A folder of checkpoints that this user may not list."""
    places = finished_run(folder)
    (places.run / "checkpoints").chmod(0)
    os.seteuid(NOBODY)
    return refuses(lambda: newest_checkpoint(places.run / "checkpoints"), "cannot be read (Permission denied)")


@attack(UNREADABLE)
@as_nobody
def forbidden_weights(folder: Path) -> Shown:
    """A manifest that can be read, and weights that can't."""
    places = finished_run(folder)
    shutil.rmtree(places.checkpoint(2))
    (places.checkpoint(4) / "weights-00001.safetensors").chmod(0)
    os.seteuid(NOBODY)
    return refuses(
        lambda: newest_checkpoint(places.run / "checkpoints"),
        "weights-00001.safetensors: cannot be read (Permission denied)",
    )


@attack(UNREADABLE)
def removed_checkpoints(folder: Path) -> Shown:
    """A finished run whose checkpoints were removed: starting again would write over its receipt."""
    places = finished_run(folder)
    shutil.rmtree(places.run / "checkpoints")
    return refused(train_words(places), "its receipt has 4 steps and there is no checkpoint", untouched=places.run)


@attack(UNREADABLE)
def manifest_of_other_types(folder: Path) -> Shown:
    """Manifests whose checksums fit, with a text for a step and a list for files."""
    places = finished_run(folder)
    rewrite(places.checkpoint(4), step="4")
    rewrite(places.checkpoint(2), files=["weights-00001.safetensors"])
    return refused(train_words(places), "not a complete checkpoint: expected step", untouched=places.run)


# Weights


@attack(CHANGED)
def other_llm(folder: Path) -> Shown:
    """The frozen LLM's file was written anew, with other numbers, before a resume."""
    places = finished_run(folder)
    other_weights(places.llama)
    return refused(train_words(places), "model.llm.source", "model.safetensors has changed", "--train.init_from")


@attack(CHANGED)
def other_vit_in_evaluation(folder: Path) -> Shown:
    """The frozen ViT's file has changed before an evaluation."""
    places = finished_run(folder)
    other_weights(places.vit)
    return refused(evaluate_words(places), "model.vision.source", "model.safetensors has changed")


@attack(CHANGED)
def other_sizes_in_replay(folder: Path) -> Shown:
    """The LLM's config.json has another epsilon before a replay."""
    places = finished_run(folder)
    config = json.loads((places.llama / "config.json").read_text())
    (places.llama / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    return refused(
        ["check", "replay", places.run, "--step", 3],
        "model.llm.source",
        "config.json has changed",
        untouched=places.run,
    )


@attack(CHANGED)
def more_tokens(folder: Path) -> Shown:
    """A file of added tokens was laid beside the tokenizer."""
    places = finished_run(folder)
    (places.llama / "added_tokens.json").write_text("{}")
    return refused(evaluate_words(places), "model.llm.tokenizer", "added_tokens.json is new")


@attack(CHANGED)
def other_source_on_the_command_line(folder: Path) -> Shown:
    """An evaluation that is told to take another LLM below the run's adapters."""
    places = finished_run(folder)
    shutil.copytree(places.llama, folder / "another")
    other_weights(folder / "another")
    return refused(evaluate_words(places, "--model.llm.source", folder / "another"), "model.llm.source", "has changed")


@attack(CHANGED)
def untuned_evaluation(folder: Path) -> Shown:
    """`--checkpoint none` over frozen weights that changed: the line that the tuned run is compared with would be
    another model's."""
    places = finished_run(folder)
    other_weights(places.llama)
    return refused(evaluate_words(places, "--checkpoint", "none"), "model.llm.source", "has changed")


@attack(CHANGED)
def seen_by_check_weights(folder: Path) -> Shown:
    """One byte of a frozen weight flipped, size and times as before: read in full on request."""
    places = finished_run(folder)
    file = places.vit / "model.safetensors"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return fails_check(["check", "weights", places.run], "model.vision.source", "model.safetensors has changed")


@attack(CHANGED)
def moved_weights(folder: Path) -> Shown:
    """Weights that moved to another disk, whole: nothing has changed."""
    places = finished_run(folder)
    places.llama.rename(folder / "llama on another disk")
    config = places.config(model__llm__source=str(folder / "llama on another disk"))
    checkpoint = newest_checkpoint(places.run / "checkpoints")
    used = weights_used(places.run, config, checkpoint, made_of(config))
    assert used["checkpoint"]["step"] == 4 and used["checkpoint"]["digest"] == checkpoint.digest
    code, output = run_vltrain(["check", "weights", places.run, "--model.llm.source", folder / "llama on another disk"])
    assert code == 0, output
    return right(output.splitlines()[-2] if output.splitlines()[-1:] == [""] else output.splitlines()[-1])


@attack(CHANGED)
def other_weights_between_rows(folder: Path) -> Shown:
    """A table of which one row is finished, and whose LLM was exchanged before the next row."""
    places = finished_run(folder)
    words = [*_table(places), "--only", "done", "--ranks", "1"]
    other_weights(places.llama)
    return refused(
        words,
        "holds row 'done' over other weights",
        "model.llm.source",
        "model.safetensors has changed",
        untouched=folder / "table" / "done",
    )


@attack(CHANGED)
def unchanged_rows(folder: Path) -> Shown:
    """The same table, nothing changed: its finished row stays finished."""
    places = finished_run(folder)
    words = [*_table(places), "--only", "done", "--ranks", "1"]
    code, output = run_vltrain(words)
    assert code == 0 and "| done" in output, output
    return right(next(line for line in output.splitlines() if "| done" in line))


def _table(places: Places) -> list[Any]:
    """The words of `vltrain ablate` for a table of two rows, of which one is the finished run."""
    recipe = yaml.safe_load(places.recipe.read_text())
    table = places.root / "table.yaml"
    table.write_text(
        yaml.safe_dump(
            {**recipe, "output": str(places.root / "table"), "rows": {"done": {}, "next": {"optim": {"lr": 1e-5}}}}
        )
    )
    words = ["ablate", table]
    (places.root / "table").mkdir()
    places.run.rename(places.root / "table" / "done")
    job = make_plan(split_arguments([str(word) for word in words[1:]] + ["--ranks", "1"])).jobs[0]
    metrics = {"accuracy": 0.5, "measure": "accuracy", "columns": {}, "total": 4, "failed": 0, "step": 4}
    write_outcome(
        job.folder, Outcome(state=DONE, made_with=job.made_with, parameters=2, trained=1, steps=4, metrics=metrics)
    )
    return words


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
    chosen = Selection(best=0.5, best_step=2, measured_by={**measured_by(places.config()), "eval.max_samples": 2})
    rewrite(places.checkpoint(), run_state={**state, "selection": chosen.state()})
    refused(
        train_words(places, "--train.early_stopping_patience", 3, "--train.eval_every_steps", 2),
        "eval.max_samples was 2, is 512",
    )
    anew = Selection(measured_by=measured_by(places.config()))
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
        lambda: LineFile(Path("/dev/full")).write("line\n"), "/dev/full: cannot be written (No space left on device)"
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
