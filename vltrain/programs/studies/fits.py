"""Accuracy against the trained share: a straight line over its logarithm, with error bars from resampled seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vltrain.programs.studies.significance import CONFIDENCE

RESAMPLED = 2000


@dataclass(frozen=True, kw_only=True)
class Fit:
    """accuracy = `at_one` + `slope` * log10(trained share), where a share is of 1. `slope_interval`: 95%, None for a
    single seed. `rms`: of what the line leaves, over all runs."""

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

    Error bars: seeds are drawn with replacement, all runs of a seed together, `RESAMPLED` times, the same ones always;
    draws that leave a single share (where seeds are missing) have no line and are left out.

    Returns: None for fewer than two shares.
    """
    if len({share for share, _, _ in points}) < 2:
        return None
    x = np.array([math.log10(share) for share, _, _ in points])
    y = np.array([value for _, _, value in points])
    slope, at_one = _least_squares(x, y, np.ones(len(x)))
    seeds = sorted({seed for _, seed, _ in points})
    interval = None
    if len(seeds) > 1:
        place = np.array([seeds.index(seed) for _, seed, _ in points])
        generator, slopes = np.random.default_rng(0), list[float]()
        for drawn in generator.integers(0, len(seeds), size=(RESAMPLED, len(seeds))):
            weights = np.bincount(drawn, minlength=len(seeds))[place].astype(float)
            if len(set(x[weights > 0].tolist())) > 1:
                slopes.append(_least_squares(x, y, weights)[0])
        low, high = np.quantile(slopes, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
        interval = (low, high)
    rms = math.sqrt(float(np.mean((y - at_one - slope * x) ** 2)))
    return Fit(slope=slope, at_one=at_one, rms=rms, seeds=len(seeds), points=len(points), slope_interval=interval)


def _least_squares(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and value at 0."""
    root = np.sqrt(weights)
    design = np.stack([x, np.ones(len(x))], axis=1) * root[:, None]
    solution, *_ = np.linalg.lstsq(design, y * root, rcond=None)
    return float(solution[0]), float(solution[1])
