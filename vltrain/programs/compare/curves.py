"""Curves of runs laid over each other: as a picture, and as event files that TensorBoard lays over each other.

Long curves of losses and gradients are drawn twice: pale as they are, and as the mean of the steps around.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vltrain.evaluate.report import measure_of
from vltrain.programs.compare.record import RunRecord, Step
from vltrain.receipts.verify import relative_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHED_FROM, WINDOWS = 200, 50  # steps, from which on a mean over a part of so many is drawn
DECADES = 20.0  # a logarithmic axis where the largest value is so many times the smallest
PANELS: tuple[tuple[str, Callable[[Step], float], str], ...] = (
    ("loss per label token", lambda step: step.loss, "linear"),
    ("gradient norm", lambda step: step.grad_norm, "log"),
    ("learning rate", lambda step: step.lr, "linear"),
)
TAGS = {"train/loss": PANELS[0][1], "train/grad_norm": PANELS[1][1], "train/lr": PANELS[2][1]}
DIFFERENCE = "compare/relative_difference_of_loss"


def draw(stages: Mapping[str, Sequence[RunRecord]], *, same_data: bool) -> bytes:
    """A PNG: a row of four panels for each stage ("" of runs that have none)."""
    figure = Figure(figsize=(11, 6.2 * len(stages)), layout="constrained")
    rows = figure.subplots(2 * len(stages), 2, squeeze=False)
    for number, (stage, runs) in enumerate(stages.items()):
        panels = [*rows[2 * number], *rows[2 * number + 1]]
        for axes, (title, value, scale) in zip(panels, PANELS):
            for place, run in enumerate(runs):
                values = [value(step) for step in run.steps.values()]
                _curve(axes, list(run.steps), values, run.name, place, smooths=title != "learning rate")
            axes.set_title(f"{stage}: {title}" if stage else title, fontsize=10)
            shown = [value(step) for run in runs for step in run.steps.values() if 0 < value(step) < math.inf]
            axes.set_yscale(scale if shown and max(shown) > DECADES * min(shown) else "linear")
        _differences(panels[3], runs, stage, same_data=same_data)
        panels[0].legend(fontsize=9)
        for axes in panels:
            axes.set_xlim(panels[0].get_xlim())
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("step", fontsize=9)
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _curve(axes: Axes, steps: list[int], values: list[float], name: str, place: int, smooths: bool) -> None:
    colour = f"C{place % 10}"
    if len(values) < SMOOTHED_FROM or not smooths:
        axes.plot(steps, values, color=colour, label=name, linewidth=1.4)
        return
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
    axes.plot(steps, smoothed(values), color=colour, label=name, linewidth=1.6)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean of the finite values around each one, fp64 [steps]; NaN where there is none. At the ends fewer count."""
    window = max(len(values) // WINDOWS, 1)
    whole = np.asarray(values, np.float64)
    finite = np.isfinite(whole)
    ones = np.ones(2 * window + 1)
    sums = np.convolve(np.where(finite, whole, 0.0), ones)[window:-window]
    counts = np.convolve(finite.astype(np.float64), ones)[window:-window]
    return np.divide(sums, counts, out=np.full(len(whole), math.nan), where=counts > 0)


def _differences(axes: Axes, runs: Sequence[RunRecord], stage: str, *, same_data: bool) -> None:
    title = f"relative difference of losses to {runs[0].name}"
    axes.set_title(f"{stage}: {title}" if stage else title, fontsize=10)
    drawn: list[float] = []
    for place, run in enumerate(runs[1:], start=1):
        differences = loss_differences(runs[0], run) if same_data else {}
        kept = {step: value for step, value in differences.items() if value > 0 and math.isfinite(value)}
        if kept:
            axes.plot(list(kept), list(kept.values()), ".", color=f"C{place % 10}", markersize=3, label=run.name)
            drawn += kept.values()
    if drawn:
        axes.set_yscale("log")
        axes.set_ylim(10 ** math.floor(math.log10(min(drawn)) - 0.1), 10 ** math.ceil(math.log10(max(drawn)) + 0.1))
    else:
        why = "none: bit for bit the same" if same_data else "not compared: different data"
        axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, fontsize=9)


def loss_differences(one: RunRecord, other: RunRecord) -> dict[int, float]:
    """By common step, relative to the other's loss."""
    return {
        step: relative_difference(one.steps[step].loss, other.steps[step].loss)
        for step in one.steps
        if step in other.steps
    }


def write_events(folder: Path, stages: Mapping[str, Sequence[RunRecord]], table: str, *, same_data: bool) -> None:
    """Event files of each run below `folder`, in a folder of its name, under the tags of a run's own.

    Args:
        table: what differs, as text, which goes with the first run.
    """
    from torch.utils.tensorboard import SummaryWriter  # a second

    for stage, runs in stages.items():
        for run in runs:
            name = run.name.replace("/", "-")
            writer = SummaryWriter(str(folder / stage / name if stage else folder / name))
            for number, step in run.steps.items():
                for tag, value in TAGS.items():
                    writer.add_scalar(tag, value(step), number)
            if same_data and run is not runs[0]:
                for number, difference in loss_differences(runs[0], run).items():
                    writer.add_scalar(DIFFERENCE, difference, number)
            for split, told in run.evaluations.items():
                for tag, figure in _figures(split, told).items():
                    writer.add_scalar(tag, figure, int(told.get("step", max(run.steps) + 1)))
            if run is runs[0]:
                writer.add_text("compare/differences", f"```\n{table}\n```", 0)
            writer.close()


def _figures(split: str, told: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation by the tags that a run gives them."""
    measure = measure_of(told)
    columns = {
        f"eval/{split}/{measure}_by/{name}": one.get(measure)
        for name, one in told.get("columns", {}).items()
        if name != "Average"
    }
    found = {f"eval/{split}/{measure}": told.get(measure), **columns}
    return {tag: float(value) for tag, value in found.items() if value is not None}
