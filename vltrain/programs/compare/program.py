"""`vltrain compare RUN RUN [...]`: runs side by side.

    vltrain compare RUN RUN [RUN ...] [--tolerance 1e-5] [--out FILE.png] [--tensorboard FOLDER]

shows what differs in their recipes (by dotted keys), in code, packages, machine, ranks, DeepSpeed's JSON, kernels and
weights; whether their receipts are whole, and name the same samples; the first step in which losses part, and what was
different in it and since when (samples, label tokens, learning rate, gradient norm, skipped updates, ranks); and the
figures of their evaluations. The first run is what each other one is compared with. Runs may still be training: what is
done so far is compared. Of runs in stages each stage is compared with its like.

    --tolerance X         relative difference of losses that counts as equal; left out: 1e-5
    --out FILE.png        the curves over each other as a picture, a new file
    --tensorboard FOLDER  the curves as event files in a new folder, so that TensorBoard lays them over each other
    --different-data      the runs were trained on different packs: compare all but their steps

Exit code: 0; 1 where a receipt is broken, or with --tolerance where losses part beyond it; 2 for a mistake in the
input, such as runs of different data.

examples:
    vltrain compare runs/quickstart runs/again --out curves.png
    vltrain compare runs/a runs/b runs/c --tolerance 0 --tensorboard runs/compared
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE, FLAGS, Arguments, split_arguments
from vltrain.config.stages import stage_folders
from vltrain.console import start_logging
from vltrain.data.folder import new_folder, refuse_existing
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.atomic import write_whole
from vltrain.metrics.step_log import LOG
from vltrain.programs.compare.differences import (
    Row,
    different_data,
    environment_differences,
    evaluation_rows,
    recipe_differences,
    require_same_data,
    table,
)
from vltrain.programs.compare.parting import Parting, part, receipt_lines
from vltrain.programs.compare.record import RunRecord, read_run, short_names

EXIT_DIFFERS = 1
TOLERANCE = 1e-5
DIFFERENT_DATA = "different-data"
OPTIONS = ("tolerance", "out", "tensorboard", DIFFERENT_DATA)


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain compare") -> int:
    """Compares the runs that the command line names. Returns the exit code, see the module."""
    arguments = split_arguments(argv, flags=(*FLAGS, DIFFERENT_DATA))
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    start_logging()
    arguments.require_known(OPTIONS)
    if len(arguments.positionals) < 2:
        raise InputError(
            f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected two runs or more: RUN RUN [...]"
        )
    tolerance, picture, events = _tolerance(arguments), _picture(arguments), _events(arguments)
    stages = read_stages([Path(word) for word in arguments.positionals])
    any_data = (DIFFERENT_DATA, None) in arguments.options
    if any_data and all(different_data(runs) is None for runs in stages.values()):
        raise InputError(f"{COMMAND_LINE}: --{DIFFERENT_DATA}: has no effect: the runs' data is the same; leave it out")
    if not any_data:
        for runs in stages.values():
            require_same_data(runs)
    begun = {stage: runs for stage, runs in stages.items() if runs}
    partings = [part(runs[0], run, tolerance) for runs in begun.values() for run in runs[1:]] if not any_data else []
    text, whole = describe(stages, partings)
    if picture is not None or events is not None:
        from vltrain.programs.compare.curves import draw, write_events  # with matplotlib, a second

        if picture is not None:
            write_whole(picture, draw(begun, same_data=not any_data))
        if events is not None:
            with new_folder(events) as folder:
                write_events(folder, begun, text, same_data=not any_data)
    print(text)
    parts = arguments.last("tolerance") is not None and any(one.step is not None for one in partings)
    return EXIT_DIFFERS if parts or not whole else 0


def _tolerance(arguments: Arguments) -> float:
    text = arguments.last("tolerance")
    try:
        value = TOLERANCE if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"{COMMAND_LINE}: --tolerance: found {text!r}, expected a relative difference such as 1e-5")
    return value


def _picture(arguments: Arguments) -> Path | None:
    text = arguments.last("out")
    if text is None:
        return None
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise InputError(f"{COMMAND_LINE}: --out: found '{text}', expected a file that ends in .png")
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; remove it or name another file with --out")
    return path


def _events(arguments: Arguments) -> Path | None:
    text = arguments.last("tensorboard")
    if text is None:
        return None
    refuse_existing(Path(text))
    return Path(text)


def read_stages(folders: Sequence[Path]) -> dict[str, list[RunRecord]]:
    """The runs by the name of a stage; of runs without stages under "". [] for a stage that not every run has begun.

    Raises: InputError as `read_run`, and for runs that have not the same stages.
    """
    names = short_names(list(folders))
    stages = [stage_folders(folder) for folder in folders]
    if not any(stages):
        return {"": [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]}
    for folder, found in zip(folders, stages, strict=True):
        if [stage.name for stage in found] != [stage.name for stage in stages[0]]:
            raise InputError(
                f"{COMMAND_LINE}: {folders[0]} and {folder} have not the same stages; compare the folders of single "
                "stages"
            )
    compared: dict[str, list[RunRecord]] = {}
    for number, stage in enumerate(stages[0]):
        begun = number == 0 or all((found[number] / LOG).is_file() for found in stages)
        compared[stage.name] = [
            read_run(found[number], name, folder) for folder, name, found in zip(folders, names, stages) if begun
        ]
    return compared


def describe(stages: Mapping[str, Sequence[RunRecord]], partings: Sequence[Parting]) -> tuple[str, bool]:
    """The whole comparison as text, and whether all receipts are whole."""
    lines: list[str] = []
    all_whole = True
    for stage, runs in stages.items():
        if not runs:
            lines += [f"stage {stage}: not compared, not all runs have begun it", ""]
            continue
        names = [run.name for run in runs]
        if stage:
            lines += [f"stage {stage}", ""]
        width = max(map(len, names))
        lines += [f"{run.name.ljust(width)}  {run.folder}: {run.progress()}" for run in runs]
        lines += _section("recipe", names, recipe_differences(runs))
        lines += _section("environment", names, environment_differences(runs))
        told, whole = receipt_lines(runs)
        lines += ["", "receipts", *told]
        all_whole &= whole
        own = [one for one in partings if one.one is runs[0]]
        lines += ["", *(line for one in own for line in one.lines())]
        if not own:
            lines.append(f"losses: not compared step by step: {different_data(runs) or 'different data'}")
        lines += _section("evaluation", names, evaluation_rows(runs), none="none in any of them")
        lines.append("")
    return "\n".join(lines).rstrip(), all_whole


def _section(title: str, names: Sequence[str], rows: Sequence[Row], none: str = "the same in all of them") -> list[str]:
    return ["", *table(title, names, rows)] if rows else ["", f"{title}: {none}"]
