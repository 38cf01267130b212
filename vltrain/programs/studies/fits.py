"""Accuracy against the trained share: a straight line over its logarithm, with error bars over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vltrain.programs.studies.significance import spread_of


@dataclass(frozen=True, kw_only=True)
class Fit:
    """accuracy = `at_one` + `slope` * log10(trained share), where a share is of 1. `slope_interval`: 95%, None for
    fewer than two seeds that have a line. `rms`: of what the line leaves, over all runs."""

    slope: float
    at_one: float
    rms: float
    seeds: int
    points: int
    slope_interval: tuple[float, float] | None

    def at(self, share: float) -> float:
        """The line's accuracy."""
        return self.at_one + self.slope * math.log10(share)


def fit_line(points: Sequence[tuple[float, int, float]]) -> Fit | None:
    """The least squares line through every run.

    Args:
        points: trained share, seed and accuracy of each.

    Error bars: each seed has a line of its own, and their slopes an interval by Student's t, around the slope of all
    runs. (Seeds drawn with replacement would give one that is too narrow: of three seeds it holds the truth in three
    cases of four, not in 95%.)

    Returns: None for fewer than two shares.
    """
    if len({share for share, _, _ in points}) < 2:
        return None
    x = np.array([math.log10(share) for share, _, _ in points])
    y = np.array([value for _, _, value in points])
    slope, at_one = _least_squares(x, y)
    seeds = np.array([seed for _, seed, _ in points])
    slopes: list[float] = []
    for seed in sorted(set(seeds.tolist())):
        own = seeds == seed
        if len(set(x[own].tolist())) > 1:
            slopes.append(_least_squares(x[own], y[own])[0])
    half = spread_of(slopes).half_width if slopes else None
    interval = None if half is None else (slope - half, slope + half)
    rms = math.sqrt(float(np.mean((y - at_one - slope * x) ** 2)))
    count = len(set(seeds.tolist()))
    return Fit(slope=slope, at_one=at_one, rms=rms, seeds=count, points=len(points), slope_interval=interval)


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and value at 0."""
    solution, *_ = np.linalg.lstsq(np.stack([x, np.ones(len(x))], axis=1), y, rcond=None)
    return float(solution[0]), float(solution[1])
