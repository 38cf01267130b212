"""The ranks that AdaLoRA leaves in each matrix, and their picture.

A Q-Former hands on the states of its queries alone, so nothing behind the last block's text FFN reaches the loss: its
rank is an artefact, and is crossed out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vltrain.models.peft.low_rank import sublayer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_FFN = ("intermediate.dense", "output.dense")


@dataclass(frozen=True, kw_only=True)
class LayerRank:
    """One matrix. `stack`: qformer, llm, or of a T5 llm.encoder and llm.decoder; `block`: its number in it; `kept` of
    `initial` directions;
    `reached`: whether a gradient can reach it."""

    stack: str
    block: int
    sublayer: str
    matrix: str
    kept: int
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
    """The heat map: per stack a row for each block and a column for each matrix; grey where there is none, crossed out
    where no gradient comes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    stacks = list(dict.fromkeys(one.stack for one in ranks))
    columns = {stack: _columns([one for one in ranks if one.stack == stack]) for stack in stacks}
    num_blocks = {stack: 1 + max(one.block for one in ranks if one.stack == stack) for stack in stacks}
    widths = [len(columns[stack]) for stack in stacks]
    figure = Figure(figsize=(2.5 + 0.6 * sum(widths), 3.4 + 0.32 * max(num_blocks.values())), layout="constrained")
    axes = figure.subplots(1, len(stacks), squeeze=False, width_ratios=widths)[0]
    highest = max(one.initial for one in ranks)
    scale = ScalarMappable(Normalize(0, highest), "viridis")
    for place, stack in zip(axes, stacks, strict=True):
        values = [[float("nan")] * len(columns[stack]) for _ in range(num_blocks[stack])]
        for one in ranks:
            if one.stack == stack:
                values[one.block][columns[stack].index((one.sublayer, one.matrix))] = one.kept
        place.imshow(values, cmap=scale.cmap, norm=scale.norm, aspect="auto")
        place.set_facecolor("lightgrey")
        place.set_title(stack)
        place.set_ylabel("block")
        place.set_yticks(range(num_blocks[stack]))
        labels = [f"{sublayer}: {matrix}" for sublayer, matrix in columns[stack]]
        place.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
        for one in ranks:
            if one.stack == stack:
                told = str(one.kept) if one.reached else "×"
                ink = "white" if one.kept < highest / 2 else "black"
                place.text(
                    columns[stack].index((one.sublayer, one.matrix)),
                    one.block,
                    told,
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=7,
                )
    figure.colorbar(scale, ax=axes, label="rank kept (×: no gradient reaches it)")
    return figure


def _columns(ranks: Sequence[LayerRank]) -> list[tuple[str, str]]:
    """Sublayers in the order of a block, and the matrices of each."""
    order = ["self", "attn", "cross", "ffn"]
    return sorted({(one.sublayer, one.matrix) for one in ranks}, key=lambda column: (order.index(column[0]), column[1]))
