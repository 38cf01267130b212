"""`vltrain recipes [NAME]`: the recipes that come with vltrain, each in a line; of one, the file with its rows or
stages.

    vltrain recipes
    vltrain recipes table2

A name is what --recipe (of vltrain train, plan, submit, doctor) and vltrain ablate take; NAME#ROW is a row of a table,
NAME#STAGE a stage.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE, split_arguments
from vltrain.config.recipe import ROWS, STAGES, read_stages, read_table
from vltrain.config.strict_yaml import load_yaml
from vltrain.errors import InputError, exits_cleanly
from vltrain.shipped import RECIPES, find_recipe

LEAST_COLUMNS, MOST_COLUMNS = 80, 140


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain recipes") -> int:
    """Lists the recipes, or shows one. Returns the exit code."""
    arguments = split_arguments(argv)
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    arguments.require_known(())
    if len(arguments.positionals) > 1:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected one name at most")
    if arguments.positionals:
        sys.stdout.write(
            find_recipe(arguments.positionals[0].partition("#")[0], COMMAND_LINE).read_text(encoding="utf-8")
        )
        return 0
    print(listing(min(max(shutil.get_terminal_size((MOST_COLUMNS, 24)).columns, LEAST_COLUMNS), MOST_COLUMNS)))
    return 0


def names() -> list[str]:
    """What a recipe may be named, rows and stages of recipes included."""
    return [
        name
        for path in sorted(RECIPES.glob("*.yaml"))
        for name in (path.stem, *(f"{path.stem}#{part}" for part in parts_of(path)[1]))
    ]


def parts_of(path: Path) -> tuple[str, list[str]]:
    """("rows" or "stages", their names) of a recipe's file; ("", []) of a plain one."""
    content = load_yaml(path)
    if isinstance(content, dict) and ROWS in content:
        return ROWS, list(read_table(path).rows)
    stages = read_stages(path)
    return (STAGES, list(stages.stages)) if stages is not None else ("", [])


def summary(path: Path) -> str:
    """The first sentence of the comment that a recipe's file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    text = re.sub(r" \(https?://[^)]*\)", "", " ".join(lines))
    return re.split(r"(?<!Eq)\. (?=[A-Z])", text, maxsplit=1)[0].rstrip(".")


def listing(columns: int) -> str:
    """A line for each recipe, cut to so many columns, with how many rows or stages it has."""
    paths = sorted(RECIPES.glob("*.yaml"))
    width = max(len(path.stem) for path in paths) + 2
    lines = []
    for path in paths:
        kind, parts = parts_of(path)
        end = f" ({len(parts)} {kind})" if parts else ""
        lines.append(
            f"{path.stem:{width}}{textwrap.shorten(summary(path), columns - width - len(end), placeholder=' ...')}{end}"
        )
    return "\n".join(lines)
