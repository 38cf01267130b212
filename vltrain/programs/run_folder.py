"""What programs that read a finished run share: its recipe, and the command line `PROGRAM RUN --output FOLDER`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vltrain.config import Config
from vltrain.console import start_logging
from vltrain.errors import InputError
from vltrain.files.strict_json import read_object
from vltrain.older_runs import ADDED, complete
from vltrain.recipe import build_config, read_recipe
from vltrain.settings import COMMAND_LINE, Arguments, split_arguments
from vltrain.train.checkpoint import Checkpoint
from vltrain.train.identity import BY_DIGEST, MADE_OF, ORIGIN, FilesOf, require_same_model, tell_unknown_files
from vltrain.train.origin import open_origin
from vltrain.train.provenance import RUN

logger = logging.getLogger(__name__)

RECIPE = "config.yaml"  # the resolved one, which every run writes


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or where it is missing into the one that it would be made in; None if it can. Leaves nothing."""
    place = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or str(error)


def require_run(run: Path, *others: str) -> None:
    """Raises InputError if `run` is not the folder of a run: without its recipe, or a file of the names `others`."""
    for name in (RECIPE, *others):
        if not (run / name).is_file():
            raise InputError(f"{run}: no {name} in it, expected the folder of a run (the recipe's `output`)")


def recipe_of(run: Path, *others: str) -> Config:
    """The resolved recipe of the run in that folder. Raises InputError as `require_run`."""
    require_run(run, *others)
    return build_config(complete(read_recipe(run / RECIPE)))


def recorded_identity(run: Path) -> dict[str, Any]:
    """What the run says of itself (`run.json`), see `vltrain.train.identity`; {} where its version kept nothing. Raises InputError."""
    return _recorded(run, "identity")


def _recorded(run: Path, name: str) -> dict[str, Any]:
    if not (run / RUN).exists():
        return {}
    found = read_object(run / RUN, "what the run was made of").get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"{run / RUN}: {name}: found {found!r:.80}, expected an object; the file was changed")
    return found


def tell_edits(run: Path) -> None:
    """Warns of settings that were edited in the run's recipe since the run wrote it. Raises InputError where one of both cannot be read."""
    wrote = _recorded(run, "settings")
    if not wrote:
        return
    for key, now in complete(read_recipe(run / RECIPE)).items():
        if key == "output" or key in BY_DIGEST:  # folders move
            continue
        before: Any = wrote
        for name in key.split("."):
            before = before.get(name, ADDED.get(key)) if isinstance(before, dict) else before
        now = list(now) if isinstance(now, tuple) else now
        if before != now:
            logger.warning("%s was edited since the run wrote it: %s was %r, is %r", run / RECIPE, key, before, now)


def weights_before(run: Path, config: Config) -> Checkpoint | None:
    """The trained weights that a run began with, of `train.init_from`; None for fresh ones. Raises InputError where they are not there any more."""
    if config.train.init_from is None:
        return None
    found = open_origin(Path(config.train.init_from).expanduser(), run)
    began = recorded_identity(run).get(ORIGIN, {})
    if isinstance(began, dict) and began.get("digest", found.digest) != found.digest:
        told = f"it began with step {began.get('step')} of {began.get('path')}, and {found.path} is of step {found.step}, or of another run"
        raise InputError(f"{run}: the weights before its tuning are not to be found: {told}; restore them, or name a checkpoint")
    return found


def weights_used(
    run: Path, config: Config, checkpoint: Checkpoint | None, files: FilesOf | None, changed_on_purpose: Collection[str] = ()
) -> dict[str, Any]:
    """Which weights a program uses, as plain JSON, after it was checked that they belong together.

    Args:
        run: whose recipe `config` is.
        checkpoint: the tuned weights; None: the model before tuning.
        files: digests of what the others are read from, see `vltrain.programs.made_of`; None where they are not read.
        changed_on_purpose: the settings of the command line, by dotted name.

    Raises: InputError if the recipe in the run's folder, or a file of its weights, is not what the weights were trained with.
    """
    tell_edits(run)
    identity = checkpoint.belongs_to if checkpoint is not None else recorded_identity(run)
    where = str(checkpoint.path if checkpoint is not None else run)
    require_same_model(identity, config, files, where, changed_on_purpose)
    if files is not None:
        tell_unknown_files(identity, where)
    tuned = None if checkpoint is None else {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest}
    changed = sorted(key for key in changed_on_purpose if key.startswith("model."))
    began = {ORIGIN: identity[ORIGIN]} if ORIGIN in identity else {}
    return {"checkpoint": tuned, **began, MADE_OF: files if files is not None else identity.get(MADE_OF, {}), "changed_settings": changed}


def read_command(argv: list[str], *, program: str, help_text: str | None, options: Sequence[str]) -> tuple[Path, Path, Arguments] | None:
    """(run, output, all arguments) of `PROGRAM RUN --output FOLDER [--OPTION VALUE]`; None where only help was asked for, which is printed.

    Raises: InputError for another command line.
    """
    arguments = split_arguments(argv)
    if ("help", None) in arguments.options:
        print(help_text)
        return None
    start_logging()
    arguments.require_known(("output", *options))
    output = arguments.last("output")
    if len(arguments.positionals) != 1 or output is None:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected {program} RUN --output FOLDER")
    return Path(arguments.positionals[0]), Path(output), arguments
