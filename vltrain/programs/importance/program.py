"""`vltrain importance RUN --output FOLDER [--checkpoint best|FOLDER]`: where AdaLoRA has left how much of its rank.

    vltrain importance runs/qformer_easyvqa/adalora --output ranks --checkpoint best

Paper: "Parameter-Efficient Fine-tuning of InstructBLIP for Visual Reasoning Tasks", the study of sublayers. The rank
that a layer keeps of its first one is a measure of its importance to the task. Written into the new folder:

    ranks.csv      network, block, sublayer, matrix, kept, initial, gradient ("none" where no gradient can reach)
    ranks.png      heat map: a row per block, a column per matrix
    summary.txt    mean rank by sublayer, blocks with the most and the least; also printed

The picture and the summary go to the run's loggers, too, where its folder can be written. A Q-Former hands on the
states of its queries alone, so nothing behind the last block's text FFN reaches the loss: its rank is an artefact and
is left out of every mean.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from vltrain.config.recipe import as_mapping
from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.inference.run import choose_checkpoint, recipe_of, weights_used
from vltrain.launching.run_folder import read_command, why_not_writable
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import open_loggers
from vltrain.metrics.table import require_loggers
from vltrain.train.checkpoints.checkpoint import kept_by_adalora
from vltrain.train.pictures.ranks import LayerRank, draw_ranks, ranks_of

logger = logging.getLogger(__name__)

LISTED = 5


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain importance") -> int:
    """Writes what the command line names. Returns the exit code."""
    told = read_command(argv, program=program, help_text=__doc__, options=("checkpoint",))
    if told is None:
        return 0
    run, output, arguments = told
    config = recipe_of(run)
    require_loggers(config.train.loggers)
    ranks, step = read_ranks(run, arguments.last("checkpoint"))
    summary, figure = summarise(ranks), draw_ranks(ranks)
    with new_folder(output) as folder:
        write_csv(ranks, folder / "ranks.csv")
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
    print(summary)
    return 0


def read_ranks(run: Path, named: str | None) -> tuple[list[LayerRank], int]:
    """The ranks that AdaLoRA left in a run's checkpoint (see `choose_checkpoint`), and the checkpoint's step.

    Raises: InputError for a run without AdaLoRA, or before its first pruning.
    """
    config = recipe_of(run)
    if config.model.adalora is None:
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
    return ranks_of(kept), checkpoint.step


def write_csv(ranks: Sequence[LayerRank], path: Path) -> None:
    """A line per matrix."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "block", "sublayer", "matrix", "kept", "initial", "gradient"])
        for one in ranks:
            writer.writerow(
                [
                    one.stack,
                    one.block,
                    one.sublayer,
                    one.matrix,
                    one.kept,
                    one.initial,
                    "yes" if one.reached else "none",
                ]
            )


def _mean(ranks: Sequence[LayerRank]) -> float:
    return sum(one.kept for one in ranks) / len(ranks)


def summarise(ranks: Sequence[LayerRank]) -> str:
    """Mean rank by network and sublayer, and where the most and the least is left; without what no gradient reaches."""
    counted = [one for one in ranks if one.reached]
    lines = [
        f"{sum(one.kept for one in ranks)} of {sum(one.initial for one in ranks)} directions are left; mean "
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
