"""How far runs agree on where AdaLoRA left how much rank.

Runs of one row of a table (`ROW/seed-N`) are one group: its ranks are means over its seeds. Between groups, and within
a group between its seeds, the agreement is Spearman's correlation of the ranks of all matrices that a gradient reaches.
What tasks differ by is told by both: two tasks agree less than two seeds of one of them, or they do not differ.
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vltrain.errors import InputError
from vltrain.programs.studies.table import seed_of
from vltrain.train.pictures.ranks import LayerRank


@dataclass(frozen=True, kw_only=True)
class RunRanks:
    """What a run left. `kept`: by layer bool [r]; `target`: directions of all layers at the end of its schedule;
    `start`: what its directions began as, equal where those of two runs are the same ones."""

    folder: Path
    ranks: list[LayerRank]
    kept: Mapping[str, Tensor]
    target: int
    start: Any


def require_comparable(runs: Sequence[RunRanks]) -> None:
    """Raises InputError for a run that comes twice, that still prunes, or that has other matrices than the first."""
    seen: set[Path] = set()
    for run in runs:
        place = run.folder.resolve()
        if place in seen:
            raise InputError(f"{run.folder}: found twice, expected each run once")
        seen.add(place)
        left = sum(int(mask.sum()) for mask in run.kept.values())
        if left != run.target:
            raise InputError(
                f"{run.folder}: {left} directions are left and its schedule ends at {run.target}: it is still pruning; "
                "train it to its end, or choose a later checkpoint"
            )
        before, now = ({name: len(mask) for name, mask in one.kept.items()} for one in (runs[0], run))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                found, expected = (f"rank {one[name]}" if name in one else "none" for one in (now, before))
                raise InputError(
                    f"{run.folder}: {name} began with {found}, that of {runs[0].folder} with {expected}; expected runs "
                    "that tune the same matrices from the same rank"
                )


def grouped(runs: Sequence[RunRanks]) -> dict[str, list[RunRanks]]:
    """By name: a table's row with its seeds, or a run; by the whole path where two have one name."""
    by_place: dict[Path, list[RunRanks]] = {}
    for run in runs:
        by_place.setdefault(run.folder if seed_of(run.folder) is None else run.folder.parent, []).append(run)
    names = [place.resolve().name for place in by_place]
    return {
        name if names.count(name) == 1 else str(place): members
        for name, (place, members) in zip(names, by_place.items(), strict=True)
    }


def mean_ranks(runs: Sequence[RunRanks]) -> tuple[list[LayerRank], list[float | None]]:
    """Each matrix's mean over the runs, in the first one's order, and its standard deviation; None of one run."""
    means: list[LayerRank] = []
    deviations: list[float | None] = []
    for matrix in zip(*(run.ranks for run in runs), strict=True):
        values = [one.kept for one in matrix]
        means.append(replace(matrix[0], kept=statistics.fmean(values)))
        deviations.append(statistics.stdev(values) if len(values) > 1 else None)
    return means, deviations


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by their mean rank; None where one of both is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(_places(first), _places(second))


def _places(values: Sequence[float]) -> list[float]:
    """Each value's place in their order; equal ones share the mean of theirs."""
    ordered = sorted(values)
    return [bisect_left(ordered, value) + (bisect_right(ordered, value) - 1) for value in values]


def overlap(first: RunRanks, second: RunRanks) -> dict[str, float] | None:
    """Of the directions that the one with fewer keeps, the share that both keep (`kept_by_both`), and what it would be
    were each matrix's drawn at random (`by_chance`); of those that a gradient reaches. None where the two did not begin
    with the same directions, so that the i-th of one is not the i-th of the other."""
    if first.start != second.start:
        return None
    both, chance, counts = 0, 0.0, [0, 0]
    for name, rank in zip(first.kept, first.ranks, strict=True):
        if rank.reached:
            mine, other = first.kept[name], second.kept[name]
            kept = int(mine.sum()), int(other.sum())
            both += int((mine & other).sum())
            chance += kept[0] * kept[1] / len(mine)
            counts = [counts[0] + kept[0], counts[1] + kept[1]]
    fewer = max(min(counts), 1)
    return {"kept_by_both": both / fewer, "by_chance": chance / fewer}


def _reached(ranks: Iterable[LayerRank]) -> list[float]:
    return [one.kept for one in ranks if one.reached]


def agreement(groups: Mapping[str, Sequence[RunRanks]]) -> dict[str, Any]:
    """Ready for JSON. `between`: each pair of groups with Spearman's correlation of their means, the mean of those of
    their single runs, and over pairs of comparable runs the mean overlap (see `overlap`); `within`: of each group with
    several seeds the mean of the correlations between two of them."""
    means = {name: _reached(mean_ranks(runs)[0]) for name, runs in groups.items()}
    between: list[dict[str, Any]] = []
    for first, second in itertools.combinations(groups, 2):
        found = [one for pair in itertools.product(groups[first], groups[second]) if (one := overlap(*pair))]
        shared = {key: statistics.fmean(one[key] for one in found) for key in found[0]} if found else None
        between.append({
            "groups": [first, second],
            "spearman": spearman(means[first], means[second]),
            "spearman_by_run": _mean_spearman(itertools.product(groups[first], groups[second])),
            "overlap": shared,
        })  # fmt: skip
    within = {name: _mean_spearman(itertools.combinations(runs, 2)) for name, runs in groups.items() if len(runs) > 1}
    return {"between": between, "within": within}


def _mean_spearman(pairs: Iterable[tuple[RunRanks, RunRanks]]) -> float | None:
    found = [spearman(_reached(first.ranks), _reached(second.ranks)) for first, second in pairs]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None


def in_words(found: Mapping[str, Any]) -> str:
    """`agreement`'s result, a line each."""
    lines = ["agreement on the ranks of matrices (Spearman; 1: the same order, 0: none):"]
    for one in found["between"]:
        first, second = one["groups"]
        told = f"  {first} and {second}: {_figure(one['spearman'])}"
        if one["spearman_by_run"] != one["spearman"]:
            told += f", between their single runs {_figure(one['spearman_by_run'])}"
        if one["overlap"] is not None:
            shares = (100 * one["overlap"][key] for key in ("kept_by_both", "by_chance"))
            told += "; both keep {:.1f}% of the directions that one can, {:.1f}% by chance".format(*shares)
        lines.append(told)
    lines += [f"  two seeds of {name}: {_figure(value)}" for name, value in found["within"].items()]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "– (all ranks are equal)" if value is None else f"{value:.3f}"
