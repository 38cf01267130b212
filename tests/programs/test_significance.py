"""Statistics of a few seeds, against published tables, closed forms and plain enumeration."""

import itertools
import math

import numpy as np
import pytest

from vltrain.programs.studies.significance import holm, paired_t, sign_flip, spread_of, t_inside, t_quantile


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_quantiles_are_those_of_students_table(freedom, published):
    assert t_quantile(0.95, freedom) == pytest.approx(published, abs=6e-4)
    assert t_inside(t_quantile(0.95, freedom), freedom) == pytest.approx(0.95, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 31])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.5])
def test_the_series_is_the_integral_of_the_density(freedom, t):
    points = np.linspace(0, t, 20_001)
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = norm * (1 + points**2 / freedom) ** (-(freedom + 1) / 2)
    assert t_inside(t, freedom) == pytest.approx(2 * np.trapezoid(density, points), abs=1e-8)
    assert t_inside(-t, freedom) == t_inside(t, freedom)


def test_mean_deviation_and_interval_are_as_by_hand():
    spread = spread_of([1.0, 2.0, 6.0])  # sd: sqrt((4 + 1 + 9) / 2)
    assert (spread.count, spread.mean) == (3, 3.0)
    assert spread.sd == pytest.approx(math.sqrt(7))
    assert spread.half_width == pytest.approx(4.302652729911 * math.sqrt(7) / math.sqrt(3), rel=1e-9)
    assert (spread_of([0.5]).sd, spread_of([0.5]).half_width) == (None, None)


def test_the_paired_test_over_seeds_is_as_published():
    """Student's own sleep data (1908): t = -4.0621, 9 degrees of freedom, p = 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert paired_t([a - b for a, b in zip(first, second)]) == pytest.approx(0.002833, abs=5e-7)


def test_without_spread_there_is_no_test_over_seeds():
    assert paired_t([0.0, 0.0, 0.0]) == 1.0
    assert paired_t([0.25, 0.25]) is None and paired_t([0.3]) is None and paired_t([]) is None


def mcnemar(gained: int, lost: int) -> float:
    tail = sum(math.comb(gained + lost, count) for count in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (5, 5), (9, 2), (30, 51), (0, 12), (400, 330)])
def test_of_right_and_wrong_answers_it_is_mcnemars_exact_test(gained, lost):
    assert sign_flip([1] * gained + [-1] * lost + [0] * 7) == pytest.approx(mcnemar(gained, lost), rel=1e-9)


@pytest.mark.parametrize("values", [[3, 1, -1, 2, 2], [1, 2, 3, -4], [5, -5, 1], [2, 2, 2, 2, -1, -3]])
def test_of_several_seeds_it_is_the_share_of_all_signs(values):
    sums = [abs(sum(s * v for s, v in zip(signs, values))) for signs in itertools.product((1, -1), repeat=len(values))]
    share = sum(found >= abs(sum(values)) for found in sums) / len(sums)
    assert sign_flip(values) == pytest.approx(share, rel=1e-9)
    drawn = sign_flip([0.1 * value for value in values])  # no whole numbers: drawn
    assert drawn == pytest.approx(share, abs=0.02) and drawn == sign_flip([0.1 * value for value in values])


def test_equal_answers_say_nothing():
    assert sign_flip([]) == sign_flip([0, 0]) == 1.0


def test_many_questions_agree_with_the_normal_law():
    values = [1] * 50_600 + [-1] * 50_000 + [2] * 900 + [-2] * 800
    z = abs(sum(values)) / math.sqrt(sum(value * value for value in values))
    assert sign_flip(values) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_holms_correction_is_as_by_hand():
    """Of 0.01, 0.04, 0.03, 0.005: times 4, 3, 2, 1 in order, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.9]) == [pytest.approx(0.04), None, 0.9]
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
