"""Statistics of a few seeds: t intervals, paired tests over seeds and over questions, corrected for many comparisons.

In closed form, since no dependency brings scipy: Student's distribution has a finite series for whole degrees of
freedom, and the sign-flip test of whole numbers is a sum of binomials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
DRAWS = 10_000  # of the sign-flip test where differences are no whole numbers
_CHUNK = 500


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one figure over seeds, in the figure's unit. `sd`: with n - 1; `half_width`: of the 95% interval of the mean,
    by Student's t. Both None for fewer than two values."""

    count: int
    mean: float
    sd: float | None
    half_width: float | None


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and 95% interval of one value or more."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Spread(count=len(values), mean=mean, sd=None, half_width=None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half_width = t_quantile(CONFIDENCE, len(values) - 1) * sd / math.sqrt(len(values))
    return Spread(count=len(values), mean=mean, sd=sd, half_width=half_width)


def t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's distribution with so many degrees of freedom, 1 or more (Abramowitz and Stegun, 26.7.3
    and 26.7.4)."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    squared = math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for number in range(2, freedom - 1, 2):
        term *= squared * (number / (number + 1) if odd else (number - 1) / number)
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(inside: float, freedom: int) -> float:
    """The t with P(|T| <= t) = `inside`, between 0 and 1."""
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < inside:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return (low + high) / 2


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired test that the mean difference is 0.

    None for fewer than two, and where all are the same and not 0: without any spread t has no value, and equal figures
    of a few questions are no proof.
    """
    spread = spread_of(differences) if differences else None
    if spread is None or spread.sd is None:
        return None
    if spread.sd <= 1e-12 * abs(spread.mean) or spread.sd == 0:
        return 1.0 if spread.mean == 0 else None
    return 1 - t_inside(spread.mean / (spread.sd / math.sqrt(spread.count)), spread.count - 1)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the paired permutation test over questions: were the two rows the same, each question's difference
    could as well have the other sign.

    Exact for whole numbers; of right and wrong answers of one run each it is McNemar's exact test. Others are drawn
    `DRAWS` times, the same ones always.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]
    if not len(values):
        return 1.0
    whole = np.rint(values)
    return _exact(whole.astype(int)) if np.array_equal(whole, values) else _drawn(values)


def _exact(values: np.ndarray) -> float:
    """The sum of |difference| whose sign is +: `mass[i]` is the probability that it is `low + i`."""
    mass, low = np.ones(1), 0
    sizes, counts = np.unique(np.abs(values), return_counts=True)
    for size, count in zip(sizes.tolist(), counts.tolist()):
        first, chances = _binomial(count)
        spaced = np.zeros((len(chances) - 1) * size + 1)
        spaced[::size] = chances
        mass, low = np.convolve(mass, spaced), low + first * size
    distance = abs(2 * (low + np.arange(len(mass))) - int(np.abs(values).sum()))
    return min(1.0, float(mass[distance >= abs(int(values.sum()))].sum()))


def _binomial(count: int) -> tuple[int, np.ndarray]:
    """The probabilities of a fair coin's heads, from the first number that is worth counting on: what is 20 standard
    deviations away is left out."""
    reach = math.ceil(10 * math.sqrt(count)) + 1
    low, high = max(0, count // 2 - reach), min(count, count // 2 + reach + 1)
    whole = math.lgamma(count + 1) - count * math.log(2)
    logs = [whole - math.lgamma(heads + 1) - math.lgamma(count - heads + 1) for heads in range(low, high + 1)]
    return low, np.exp(np.array(logs))


def _drawn(values: np.ndarray) -> float:
    generator, found = np.random.default_rng(0), abs(values.sum())
    as_far = 0
    for _ in range(DRAWS // _CHUNK):
        signs = generator.integers(0, 2, size=(_CHUNK, len(values)), dtype=np.int8) * 2.0 - 1.0
        as_far += int((np.abs(signs @ values) >= found * (1 - 1e-12)).sum())
    return (as_far + 1) / (DRAWS + 1)


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """p corrected by Holm for all comparisons that have one: the chance of a single false one among them stays below
    the level."""
    known = sorted((chance, place) for place, chance in enumerate(chances) if chance is not None)
    corrected: list[float | None] = [None] * len(chances)
    least = 0.0
    for number, (chance, place) in enumerate(known):
        least = max(least, min(1.0, chance * (len(known) - number)))
        corrected[place] = least
    return corrected
