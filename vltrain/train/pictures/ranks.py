"""The ranks that AdaLoRA leaves in each matrix, and their picture.

A Q-Former hands on the states of its queries alone, so nothing behind the last block's text FFN reaches the loss: its
rank is an artefact, and is crossed out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vltrain.models.peft.low_rank import sublayer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT_FFN = ("intermediate.dense", "output.dense")


@dataclass(frozen=True, kw_only=True)
class LayerRank:
    """One matrix. `stack`: qformer, llm, or of a T5 llm.encoder and llm.decoder; `block`: its number in it; `kept` of
    `initial` directions, a mean where it is of several runs; `reached`: whether a gradient can reach it."""

    stack: str
    block: int
    sublayer: str
    matrix: str
    kept: float
    initial: int
    reached: bool


def ranks_of(kept: Mapping[str, Tensor]) -> list[LayerRank]:
    """The rank of each matrix. `kept`: by layer's full name bool [r], which of its directions are left."""
    places = {layer: _place(layer) for layer in kept}
    last = max((block for stack, block, _ in places.values() if stack == "qformer"), default=-1)
    ranks = []
    for layer, mask in kept.items():
        stack, block, matrix = places[layer]
        reached = not (stack == "qformer" and block == last and matrix in TEXT_FFN)
        _, sublayer = sublayer_of(layer)
        ranks.append(
            LayerRank(
                stack=stack,
                block=block,
                sublayer=sublayer,
                matrix=matrix,
                kept=int(mask.sum()),
                initial=len(mask),
                reached=reached,
            )
        )
    return ranks


def _place(layer: str) -> tuple[str, int, str]:
    """(stack, block, matrix) of a layer's full name."""
    found = re.fullmatch(
        r"(qformer|llm)\.(?:encoder\.layer|model\.layers|(encoder|decoder)\.block)\.(\d+)\.(.+)", layer
    )
    assert found is not None, layer
    root, side, block, matrix = found.groups()
    return (f"{root}.{side}" if side else root), int(block), matrix


def draw_ranks(ranks: Sequence[LayerRank]) -> Figure:
    """The heat map of a run: per stack a row for each block and a column for each matrix; grey where there is none,
    crossed out where no gradient comes."""
    from matplotlib.figure import Figure

    stacks, highest = _stacks(ranks), max(one.initial for one in ranks)
    widths = [len(_columns(members)) for members in stacks.values()]
    height = max(_num_blocks(members) for members in stacks.values())
    figure = Figure(figsize=(2.5 + 0.6 * sum(widths), 3.4 + 0.32 * height), layout="constrained")
    axes = figure.subplots(1, len(stacks), squeeze=False, width_ratios=widths)[0]
    for place, (stack, members) in zip(axes, stacks.items(), strict=True):
        _draw(place, members, stack, highest)
    _legend(figure, axes, highest)
    return figure


def draw_side_by_side(panels: Mapping[str, Sequence[LayerRank]]) -> Figure:
    """Heat maps of several runs, or means of several, of the same matrices: a column of panels for each, a row for each
    stack, one scale and one order for all."""
    from matplotlib.figure import Figure

    stacks = {name: _stacks(ranks) for name, ranks in panels.items()}
    first = next(iter(stacks.values()))
    highest = max(one.initial for ranks in panels.values() for one in ranks)
    width = max(len(_columns(members)) for members in first.values())
    heights = [_num_blocks(members) for members in first.values()]
    size = (1.6 + len(panels) * (0.8 + 0.42 * width), 1.0 + 2.4 * len(heights) + 0.3 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(first), len(panels), squeeze=False, height_ratios=[8 + height for height in heights])
    for column, (name, of_run) in enumerate(stacks.items()):
        for row, (stack, members) in enumerate(of_run.items()):
            _draw(axes[row][column], members, f"{name}: {stack}", highest)
    _legend(figure, axes, highest)
    return figure


def _stacks(ranks: Sequence[LayerRank]) -> dict[str, list[LayerRank]]:
    names = dict.fromkeys(one.stack for one in ranks)
    return {stack: [one for one in ranks if one.stack == stack] for stack in names}


def _num_blocks(ranks: Sequence[LayerRank]) -> int:
    return 1 + max(one.block for one in ranks)


def _draw(place: Axes, ranks: Sequence[LayerRank], title: str, highest: int) -> None:
    """One stack."""
    columns = _columns(ranks)
    values = [[float("nan")] * len(columns) for _ in range(_num_blocks(ranks))]
    for one in ranks:
        column = columns.index((one.sublayer, one.matrix))
        values[one.block][column] = one.kept
        told = f"{one.kept:.3g}" if one.reached else "×"
        ink = "white" if one.kept < highest / 2 else "black"
        place.text(column, one.block, told, ha="center", va="center", color=ink, fontsize=7)
    place.imshow(values, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
    place.set_facecolor("lightgrey")
    place.set_title(title, fontsize=10)
    place.set_ylabel("block")
    place.set_yticks(range(len(values)))
    labels = [f"{sublayer}: {matrix}" for sublayer, matrix in columns]
    place.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)


def _legend(figure: Figure, axes: Any, highest: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, highest), "viridis")
    figure.colorbar(scale, ax=axes, label="rank kept (×: no gradient reaches it)")


def _columns(ranks: Sequence[LayerRank]) -> list[tuple[str, str]]:
    """Sublayers in the order of a block, and the matrices of each."""
    order = ["self", "attn", "cross", "ffn"]
    return sorted({(one.sublayer, one.matrix) for one in ranks}, key=lambda column: (order.index(column[0]), column[1]))
