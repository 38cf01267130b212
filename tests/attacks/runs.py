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

import yaml
from safetensors.torch import load_file, save_file

from tests.attacks.attack import AttackFailed, Shown, attack, refused, refuses, right, run_vltrain
from tests.support.finished_run import Places, finished_run
from vltrain.config.command_line import split_arguments
from vltrain.inference.run import weights_used
from vltrain.programs.studies.rows import make_plan
from vltrain.programs.studies.table import DONE, Outcome, write_outcome
from vltrain.receipts.manifest import dumps
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.run.made_of import made_of

UNREADABLE = "checkpoints that are there and cannot be used"
CHANGED = "weights or tokenizer that are not the run's any more"
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
    return refused(train_words(places), "step-00000004: a symbolic link", untouched=places.run)


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
    return refused(train_words(places), "latest: names step-00000004, which does not exist", untouched=places.run)


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
