"""What a run's folder says of the run, as far as runs can be compared by it; of one that is still training what is
there so far.

A step's loss, gradient norm and learning rate are those of `log.jsonl`, its samples and label tokens those of the
receipt, which an old or a moved run may lack.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vltrain.config.older_runs import complete
from vltrain.config.recipe import RECIPE, RUN, read_recipe
from vltrain.config.strict_yaml import is_mapping
from vltrain.errors import InputError
from vltrain.files.lock import lock_inside, writer_of
from vltrain.files.strict_json import read_object
from vltrain.metrics.step_log import LOG, read_step_log
from vltrain.receipts.manifest import newest_in, read_manifest
from vltrain.receipts.receipt import RECEIPT, Receipt, read_receipt


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step. samples (the fingerprint), label_tokens and skipped: None where no receipt says them."""

    loss: float
    grad_norm: float
    lr: float
    samples: str | None = None
    label_tokens: int | None = None
    skipped: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run.

    Args:
        name: what it is called beside the others.
        settings: its recipe, by dotted name.
        facts: what it was made of (`run.json`), {} of an old run; `deepspeed`: its JSON as it was resolved.
        steps: those that are done, in order.
        kernels: which ones its newest checkpoint was made with, where it says so.
        evaluations: by split, what `metrics.json` says.
        trains: a process writes into it now.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    deepspeed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: Mapping[int, Step] = field(default_factory=dict[int, Step])
    receipt: Receipt | None = None
    kernels: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    trains: bool = False

    @property
    def data(self) -> tuple[str, str] | None:
        """Checksum and folder of its packs; None where nothing says them."""
        if self.receipt is not None:
            return self.receipt.header.data, self.receipt.header.packs
        told = self.facts.get("data")
        if is_mapping(told) and isinstance(told.get("checksum"), str):
            return told["checksum"], str(told.get("packs"))
        return None

    def progress(self) -> str:
        """How far it is: `120 of 312 steps, still training`."""
        done = max(self.steps, default=-1) + 1
        whole = f"{done} steps" if self.receipt is None else f"{done} of {self.receipt.header.num_steps} steps"
        return f"{whole}, still training" if self.trains else whole


def read_run(folder: Path, name: str, whole: Path | None = None) -> RunRecord:
    """Reads a run. `whole`: of a stage the folder of the run in stages.

    Raises: InputError for what is no run's folder, for one that has done no step yet, and for files that were damaged.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder}: no {RECIPE} in it, expected the folder of a run (the recipe's `output`)")
    if not (folder / LOG).is_file():
        raise InputError(f"{folder}: no {LOG} in it, so no step is done yet; expected a run that has begun to train")
    receipt = read_receipt(folder / RECEIPT) if (folder / RECEIPT).exists() else None
    newest = newest_in(folder / "checkpoints", read_manifest) if (folder / "checkpoints").is_dir() else None
    kernels = {} if newest is None else newest.run_state.get("kernels", {})
    places = [folder] if whole is None else [folder, whole]
    return RunRecord(
        name=name,
        folder=folder,
        settings=complete(read_recipe(folder / RECIPE)),
        facts=_object(folder / RUN),
        deepspeed=_object(folder / "ds_config.json"),
        steps=_steps(folder, receipt),
        receipt=receipt,
        kernels=kernels if is_mapping(kernels) else {},
        evaluations=_evaluations(folder),
        trains=any(writer_of(lock_inside(place)) is not None for place in places),
    )


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _steps(folder: Path, receipt: Receipt | None) -> dict[int, Step]:
    lines = {} if receipt is None else {line.step: line for line in receipt.lines}
    steps: dict[int, Step] = {}
    for number, told in sorted(read_step_log(folder / LOG).items()):
        missing = [name for name in ("loss", "grad_norm", "lr") if name not in told]
        if missing:
            raise InputError(f"{folder / LOG}: step {number}: no {missing[0]}; the file was changed or damaged")
        line = lines.get(number)
        counts = {"samples": line.samples, "label_tokens": line.label_tokens, "skipped": line.skipped} if line else {}
        steps[number] = Step(loss=told["loss"], grad_norm=told["grad_norm"], lr=told["lr"], **counts)
    return steps


def _evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    found = sorted((folder / "eval").glob("**/metrics.json"))
    return {str(path.parent.relative_to(folder / "eval")): read_object(path) for path in found}


def short_names(folders: list[Path]) -> list[str]:
    """What to call runs: the last parts of their paths, as many as tell them apart. Raises InputError where one is
    there twice."""
    whole = [Path(os.path.realpath(folder)) for folder in folders]  # of a link to itself, too
    for place, one in enumerate(whole):
        if one in whole[:place]:
            raise InputError(f"{folders[place]}: is there twice, expected runs that differ")
    names = [one.name for one in whole]
    length = 1
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(one.parts[-length:]) for one in whole]
    return names
