"""The norms of the trained weights by layer over the steps, as a heat map and by part as curves.

Measured at logging steps and kept in the run's folder, so that a run that goes on draws all of its lives:

    norms.jsonl    {"step": 9, "norms": {"llm.model 0": 1.25, ...}}

Under ZeRO-3 each rank adds up the squares of what it has; no weight is gathered. Trade-off: a norm says that a layer
moves, not where to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from vltrain.errors import InputError
from vltrain.files.appended import AppendedFile
from vltrain.files.strict_json import is_object, read_lines
from vltrain.metrics.base import MetricLogger
from vltrain.metrics.step_log import plain_number, truncate_jsonl
from vltrain.train.zero.engine import Engine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMS = "norms.jsonl"
MOST_COLUMNS = 120  # of the heat map; of more steps as many are shown, evenly spaced, the last one too
LABELLED = 40  # rows, up to which each has a name


@torch.no_grad()
def weight_norms(engine: Engine) -> dict[str, float]:
    """The L2 norm of each trainable parameter by full name. Waits for the device. A collective under ZeRO-3."""
    parts: list[Any] = list(engine.trainable.values())
    if engine.stage == 3:
        parts = [_own_part(parameter) for parameter in parts]
    squares = torch.stack([part.float().norm().double().to(engine.device) ** 2 for part in parts])
    if engine.stage == 3 and engine.world_size > 1:
        dist.all_reduce(squares)
    return dict(zip(engine.trainable, squares.sqrt().tolist(), strict=True))


def _own_part(parameter: Any) -> torch.Tensor:
    """What this rank has of a parameter under ZeRO-3, flat, without what fills it up."""
    part = parameter.ds_tensor.view(-1)
    return part[: min(max(parameter.ds_numel - len(part) * dist.get_rank(), 0), len(part))]


def layer_of(name: str) -> str:
    """The layer of a parameter's full name: `llm.model 3` of `llm.model.layers.3.mlp.adapter.down_weight`; of one that
    is in none the network, `neck`."""
    words = name.split(".")
    place = next((place for place, word in enumerate(words) if word.isdecimal()), None)
    if place is None:
        return words[0]
    return f"{'.'.join(words[: max(place - 1, 1)])} {words[place]}"


class WeightNorms:
    """Keeps and draws the norms. On ranks other than 0 only `measure` does anything: its part of a collective.

    Args:
        folder: the run's.
        part_of: the part (adapter, neck, ...) of a parameter's full name.
        first_step: what earlier lives of the run measured at or after this step is dropped.
    """

    def __init__(
        self, folder: Path, loggers: MetricLogger, part_of: Callable[[str], str], *, active: bool, first_step: int
    ) -> None:
        self._path, self._loggers, self._part_of, self._active = folder / NORMS, loggers, part_of, active
        self._has_new = False
        if active and self._path.exists():
            truncate_jsonl(self._path, first_step)

    def measure(self, norms: Mapping[str, float], step: int) -> None:
        """Takes the norms of all trained parameters, by full name, after a step."""
        if not self._active:
            return
        by_layer = _joined(norms, layer_of)
        by_part = {f"adapters/norm/{part}": norm for part, norm in _joined(norms, self._part_of).items()}
        self._loggers.scalars(by_part, step)
        file = AppendedFile(self._path)
        file.write(json.dumps({"step": step, "norms": {k: plain_number(norm) for k, norm in by_layer.items()}}) + "\n")
        file.close()
        self._has_new = True

    def show(self, steps_done: int) -> None:
        """Draws what was measured so far, if there is anything new."""
        if self._active and self._has_new:
            self._has_new = False
            self._loggers.figure("adapters/norm_by_layer", draw_norms(read_norms(self._path)), steps_done)


def _joined(norms: Mapping[str, float], group_of: Callable[[str], str]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        group = group_of(name)
        squares[group] = squares.get(group, 0.0) + norm * norm
    return {group: math.sqrt(square) for group, square in squares.items()}


def read_norms(path: Path) -> dict[int, dict[str, float]]:
    """By step the norm of each layer. Raises InputError for a file that is none of these."""
    found: dict[int, dict[str, float]] = {}
    for where, line in read_lines(path, "the norms of a run's weights"):
        try:
            found[int(line["step"])] = {name: float(norm) for name, norm in line["norms"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            shown = sorted(line) if is_object(line) else line
            raise InputError(f"{where}: found {shown!r:.80}, expected step and norms; the file was changed") from None
    return found


def draw_norms(norms: Mapping[int, Mapping[str, float]]) -> Figure:
    """A heat map of a row per layer and a column per step: the norm relative to the first one; the last norm itself
    stands behind the row."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    steps = _evenly(sorted(norms), MOST_COLUMNS)
    layers = list(norms[steps[0]])
    first = [norms[steps[0]][layer] for layer in layers]
    values = [
        [norms[step].get(layer, math.nan) / before if before else math.nan for step in steps]
        for layer, before in zip(layers, first, strict=True)
    ]
    figure = Figure(figsize=(8, 1.6 + 0.24 * min(len(layers), LABELLED)), layout="constrained")
    axes = figure.subplots()
    scale = PowerNorm(0.5)  # one part that grows far more than the others leaves them apart
    picture = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", norm=scale)
    every = -(-len(layers) // LABELLED)
    rows = range(0, len(layers), every)
    axes.set_yticks(rows, [layers[row] for row in rows], fontsize=8)
    shown = _evenly(range(len(steps)), 8)
    axes.set_xticks(shown, [str(steps[place]) for place in shown], fontsize=8)
    axes.set_xlabel("step", fontsize=9)
    axes.set_title("norm of the trained weights relative to the first one measured; at the right the last", fontsize=9)
    for row in rows:
        axes.text(len(steps) - 0.3, row, f"{norms[steps[-1]].get(layers[row], math.nan):.3g}", va="center", fontsize=7)
    figure.colorbar(picture, ax=axes, pad=0.08)
    return figure


def _evenly(values: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
