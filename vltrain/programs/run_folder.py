"""What programs that read a finished run share: its recipe, and the command line `PROGRAM RUN --output FOLDER`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vltrain.config import Config
from vltrain.console import start_logging
from vltrain.errors import InputError
from vltrain.older_runs import complete
from vltrain.recipe import build_config, read_recipe
from vltrain.settings import COMMAND_LINE, Arguments, split_arguments

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
