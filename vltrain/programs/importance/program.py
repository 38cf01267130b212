"""`vltrain importance RUN [RUN ...] --output FOLDER [--checkpoint best|FOLDER]`: where AdaLoRA has left how much of its
rank, in one run or in several side by side.

    vltrain importance runs/qformer_easyvqa/adalora --output ranks --checkpoint best
    vltrain importance runs/qformer_tasks_small/{all,easyvqa,shapes}_r4/seed-* --output ranks

Paper: "Parameter-Efficient Fine-tuning of InstructBLIP for Visual Reasoning Tasks", the study of sublayers. The rank
that a layer keeps of its first one is a measure of its importance to the task. Written into the new folder:

    ranks.csv        network, block, sublayer, matrix, kept, initial, gradient ("none" where no gradient can reach)
    ranks.png        heat map: a row per block, a column per matrix
    summary.txt      mean rank by sublayer, blocks with the most and the least; also printed

Of several runs, which must tune the same matrices and have done all their pruning, ranks.csv begins with the run and
ends with the standard deviation over a table row's seeds, whose means are shown as one (ROW/seed-N); ranks.png has them
as panels of one scale and order; summary.txt has each, and how far they agree, which is in agreement.json, too.

A run's picture and summary go to its loggers, too, where its folder can be written. A Q-Former hands on the states of
its queries alone, so nothing behind the last block's text FFN reaches the loss: its rank is an artefact and is left out
of every mean.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE
from vltrain.config.recipe import as_mapping
from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.atomic import write_json
from vltrain.inference.run import choose_checkpoint, recipe_of, weights_used
from vltrain.launching.run_folder import read_commands, why_not_writable
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import open_loggers
from vltrain.metrics.table import require_loggers
from vltrain.programs.importance.agreement import (
    RunRanks,
    agreement,
    grouped,
    in_words,
    mean_ranks,
    require_comparable,
)
from vltrain.receipts.manifest import BEST
from vltrain.train.checkpoints.checkpoint import kept_by_adalora
from vltrain.train.pictures.ranks import LayerRank, draw_ranks, draw_side_by_side, ranks_of

logger = logging.getLogger(__name__)

LISTED = 5


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain importance") -> int:
    """Writes what the command line names. Returns the exit code."""
    told = read_commands(argv, program=program, help_text=__doc__, options=("checkpoint",))
    if told is None:
        return 0
    runs, output, arguments = told
    named = arguments.last("checkpoint")
    if len(runs) > 1:
        if named not in (None, BEST):
            raise InputError(
                f"{COMMAND_LINE}: --checkpoint {named}: names one run's; of several runs say best, or none"
            )
        summary = _side_by_side([read_run(run, named)[0] for run in runs], output)
    else:
        summary = _alone(runs[0], named, output)
    print(summary)
    return 0


def _alone(run: Path, named: str | None, output: Path) -> str:
    config = recipe_of(run)
    require_loggers(config.train.loggers)
    found, step = read_run(run, named)
    summary, figure = summarise(found.ranks), draw_ranks(found.ranks)
    with new_folder(output) as folder:
        write_csv({"": found.ranks}, folder / "ranks.csv")
        figure.savefig(folder / "ranks.png", dpi=150)
        (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    reason = why_not_writable(run / "tensorboard")
    if reason is not None:
        logger.warning("%s: cannot be written (%s): the picture is in %s alone", run, reason, output)
    else:
        loggers = open_loggers(config.train.loggers, RunContext(folder=run, settings=as_mapping(config)))
        loggers.figure("adalora/ranks", figure, step)
        loggers.text("adalora/ranks", "```\n" + summary + "\n```", step)
        loggers.close()
    return summary


def _side_by_side(runs: Sequence[RunRanks], output: Path) -> str:
    require_comparable(runs)
    groups = grouped(runs)
    means = {name: mean_ranks(members) for name, members in groups.items()}
    panels = {name: ranks for name, (ranks, _) in means.items()}
    found = agreement(groups)
    parts = [
        f"{name} ({len(groups[name])} run{'s' * (len(groups[name]) > 1)}): {summarise(ranks)}"
        for name, ranks in panels.items()
    ]
    summary = "\n\n".join((*parts, in_words(found)))
    with new_folder(output) as folder:
        write_csv(panels, folder / "ranks.csv", {name: deviations for name, (_, deviations) in means.items()})
        draw_side_by_side(panels).savefig(folder / "ranks.png", dpi=150)
        folders = {name: [str(run.folder) for run in members] for name, members in groups.items()}
        write_json(folder / "agreement.json", {"runs": folders, **found})
        (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    return summary


def read_run(run: Path, named: str | None) -> tuple[RunRanks, int]:
    """The ranks that AdaLoRA left in a run's checkpoint (see `choose_checkpoint`), and the checkpoint's step.

    Raises: InputError for a run without AdaLoRA, or before its first pruning.
    """
    config = recipe_of(run)
    schedule = config.model.adalora
    if schedule is None:
        raise InputError(
            f"{run}: its recipe tunes nothing by AdaLoRA, expected model.instructblip.qformer.mode or llm.mode adalora"
        )
    checkpoint = choose_checkpoint(run, named)
    weights_used(run, config, checkpoint, None)
    kept = kept_by_adalora(checkpoint) if checkpoint is not None else {}
    if checkpoint is None or not kept:
        raise InputError(
            f"{run}: AdaLoRA had pruned nothing yet at {checkpoint.path if checkpoint else 'the start'}; choose "
            "a later checkpoint"
        )
    start = (config.model.seed, config.train.init_from, config.model.start)
    found = RunRanks(folder=run, ranks=ranks_of(kept), kept=kept, target=schedule.target_rank * len(kept), start=start)
    return found, checkpoint.step


def write_csv(
    panels: Mapping[str, Sequence[LayerRank]],
    path: Path,
    deviations: Mapping[str, Sequence[float | None]] | None = None,
) -> None:
    """A line per matrix, of the one run under no name, or of each by its name with its standard deviations."""
    first, last = (["run"], ["sd"]) if deviations is not None else ([], [])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*first, "network", "block", "sublayer", "matrix", "kept", "initial", "gradient", *last])
        for name, ranks in panels.items():
            for number, one in enumerate(ranks):
                reached = "yes" if one.reached else "none"
                line = [one.stack, one.block, one.sublayer, one.matrix, f"{one.kept:g}", one.initial, reached]
                own = [name] if deviations is not None else []
                deviation = None if deviations is None else deviations[name][number]
                told = [] if deviations is None else ["" if deviation is None else f"{deviation:g}"]
                writer.writerow([*own, *line, *told])


def _mean(ranks: Sequence[LayerRank]) -> float:
    return sum(one.kept for one in ranks) / len(ranks)


def summarise(ranks: Sequence[LayerRank]) -> str:
    """Mean rank by network and sublayer, and where the most and the least is left; without what no gradient reaches."""
    counted = [one for one in ranks if one.reached]
    lines = [
        f"{sum(one.kept for one in ranks):g} of {sum(one.initial for one in ranks)} directions are left; mean "
        "rank of a matrix by sublayer:"
    ]
    groups: dict[tuple[str, str], list[LayerRank]] = {}
    for one in counted:
        groups.setdefault((one.stack, one.sublayer), []).append(one)
    for (stack, sublayer), members in sorted(groups.items(), key=lambda item: -_mean(item[1])):
        lines.append(
            f"  {stack:12} {sublayer:6} {_mean(members):6.2f} of {members[0].initial}  ({len(members)} matrices)"
        )
    blocks: dict[tuple[str, int, str], list[LayerRank]] = {}
    for one in counted:
        blocks.setdefault((one.stack, one.block, one.sublayer), []).append(one)
    ordered = sorted(blocks.items(), key=lambda item: -_mean(item[1]))
    for title, chosen in (("most", ordered[:LISTED]), ("least", ordered[::-1][:LISTED])):
        told = ", ".join(
            f"{stack} {block} {sublayer} {_mean(members):.2f}" for (stack, block, sublayer), members in chosen
        )
        lines.append(f"{title}: {told}")
    dead = [one for one in ranks if not one.reached]
    if dead:
        names = ", ".join(one.matrix for one in dead)
        why = "no gradient reaches the last text FFN, since only queries are handed on"
        lines.append(f"not counted: {names} of qformer block {dead[0].block}; {why}")
    return "\n".join(lines)
