"""What programs that read a finished run share: the command line `PROGRAM RUN --output FOLDER`, and whether a folder
can be written to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE, FLAGS, QUIET, Arguments, split_arguments
from vltrain.config.stages import last_stage
from vltrain.console import start_logging
from vltrain.errors import InputError


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or where it is missing into the one that it would be made in; None if
    it can. Leaves nothing."""
    place = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or str(error)


def read_command(
    argv: list[str], *, program: str, help_text: str | None, options: Sequence[str], can_be_quiet: bool = False
) -> tuple[Path, Path, Arguments] | None:
    """(run, output, all arguments) of `PROGRAM RUN --output FOLDER [--OPTION VALUE]`; None where only help was asked
    for, which is printed.

    Raises: InputError for another command line.
    """
    told = read_commands(argv, program=program, help_text=help_text, options=options, can_be_quiet=can_be_quiet)
    if told is None:
        return None
    runs, output, arguments = told
    if len(runs) != 1:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected {program} RUN --output FOLDER")
    return runs[0], output, arguments


def read_commands(
    argv: list[str], *, program: str, help_text: str | None, options: Sequence[str], can_be_quiet: bool = False
) -> tuple[list[Path], Path, Arguments] | None:
    """The same of `PROGRAM RUN [RUN ...] --output FOLDER`: one run or more."""
    flags = (QUIET,) if can_be_quiet else ()
    arguments = split_arguments(argv, flags=(*FLAGS, *flags))
    if ("help", None) in arguments.options:
        print(help_text)
        return None
    start_logging(quiet=(QUIET, None) in arguments.options)
    arguments.require_known(("output", *options, *flags))
    output = arguments.last("output")
    if not arguments.positionals or output is None:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected {program} RUN --output FOLDER")
    return [last_stage(Path(word)) for word in arguments.positionals], Path(output), arguments
