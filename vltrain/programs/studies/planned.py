"""What rows of a table would take at full size: memory of a GPU, hours, by `vltrain plan`; kept in planned.json."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vltrain.config.command_line import load_settings
from vltrain.config.recipe import dump_config
from vltrain.config.schema import Config
from vltrain.data.plan import length_of
from vltrain.data.stream.mixing import Mixing
from vltrain.errors import InputError
from vltrain.files.atomic import write_json
from vltrain.files.strict_json import read_object
from vltrain.programs import plan as one_recipe

logger = logging.getLogger(__name__)

PLANNED = "planned.json"
PASSED_ON = ("gpus", "card", "utilisation", "bandwidth")


def plan_row(
    config: Config,
    recipe: str,
    overrides: Sequence[str],
    options: Sequence[str],
    packs: int | None,
    known: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Memory and time of a row, ready for JSON.

    Args:
        config: the row's.
        recipe: what --recipe takes for it.
        overrides, options: words of the command line, of the recipe and of `vltrain plan`.
        packs: of all training data, where they are not on this machine.
        known: what `vltrain plan` has said before, by settings: rows that differ in their share of the data are planned
            once.

    Returns: `peak_gib` of each GPU, `gpus`, `step_seconds`, `steps`, `hours` (None where not known), `origin` of the
    rate, and `trained` parameters with the share that the table shows, of all or `of_qformer`'s full tuning.

    Raises: InputError as `vltrain plan`.
    """
    # A share's steps follow from those of all samples, whose packs alone may be here.
    whole = [word for word in overrides if not word.startswith("--data.fraction")]
    words = ["--recipe", recipe, *whole, *options, *(("--data.fraction", "1") if config.data.fraction < 1 else ())]
    settings = load_settings(words, program="vltrain ablate --plan", options=one_recipe.OPTIONS)
    key = dump_config(replace(settings.config, output=""))
    found = known[key] = known.get(key) or one_recipe.plan_recipe(settings)
    if found["steps_per_epoch"] is not None:
        packs = round(found["steps_per_epoch"] * config.train.packs_per_step)
    steps, hours = found["duration"].get("steps"), None
    if packs is not None and (steps is None or config.data.fraction < 1):
        share, train = max(1, round(packs * config.data.fraction)), config.train
        steps = length_of(Mixing.alone(share), train.epochs, train.packs_per_step, train.max_steps)[1]
    seconds = found["duration"]["step_seconds"]
    if steps is not None and seconds is not None:
        hours = steps * seconds / 3600
    counts, full = found["parameters"]["all"], found["full_qformer_tuning"]
    return {
        "peak_gib": found["memory_per_rank"]["peak_gib"],
        "gpus": found["gpus"],
        "steps": steps,
        "step_seconds": seconds,
        "hours": hours,
        "origin": found["duration"]["origin"],
        "trained": counts["trainable"],
        "of_qformer": full is not None,
        "trained_share": counts["trainable"] / (full["parameters"] if full else counts["total"]),
    }


def write_planned(folder: Path, planned: dict[str, dict[str, Any]]) -> None:
    """Keeps them for the table."""
    write_json(folder / PLANNED, planned)


def read_planned(folder: Path) -> dict[str, dict[str, Any]]:
    """What was planned of the table in `folder`, by row; nothing where nothing was. Raises InputError for a damaged
    file."""
    path = folder / PLANNED
    if not path.exists():
        return {}
    content = read_object(path, "what was planned of a table")
    for row, one in content.items():
        if not isinstance(one, dict) or not {"peak_gib", "hours", "gpus"} <= one.keys():
            raise InputError(f"{path}: {row}: found no plan of a row; remove the file, and plan again")
    return content
