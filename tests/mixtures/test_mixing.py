"""The stream of a mixture: shares, passes and ends, beside plain counting."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from vltrain.data.flat.index import INDEX_SCHEMA, Index
from vltrain.data.plan import PackCost, Plan, length_of
from vltrain.data.stream.mixing import WHOLE, Mixing, shares_of
from vltrain.data.stream.permutation import permute

SIZES = {2: (37, 11), 3: (40, 25, 90), 5: (30, 8, 60, 17, 3)}
WEIGHTS = {2: (1.0, 2.7), 3: (5.0, 3.0, 2.0), 5: (0.13, 1.0, 0.7, 3.3, 0.02)}
LONGEST = {2: 1.0, 3: 2.0, 5: 2.5}
"""Packs that a stretch of any length may be off by: of two sets less than one, by the formula; of more as measured."""


def mixing_of(num_sets: int, **changes) -> Mixing:
    shares = shares_of(WEIGHTS[num_sets], [1.0] * num_sets)
    given = {"names": tuple("abcde"[:num_sets]), "num_packs": SIZES[num_sets], "shares": shares, **changes}
    return Mixing(**given)


@pytest.mark.parametrize("num_sets", SIZES)
@pytest.mark.parametrize("packs_per_step", (1, 3))
def test_every_stretch_holds_its_shares(num_sets, packs_per_step):
    mixing, num = mixing_of(num_sets), 20_000
    sets, _ = mixing.split(np.arange(num, dtype=np.int64))
    share = np.array(mixing.shares) / WHOLE
    assert np.allclose(share, np.array(WEIGHTS[num_sets]) / sum(WEIGHTS[num_sets]), atol=1e-9)
    counts = np.concatenate([[[0] * num_sets], np.cumsum(sets[:, None] == np.arange(num_sets), axis=0)])
    for length in (100 * packs_per_step, 7, 1, 4001):
        found = counts[length:] - counts[:-length]
        assert np.abs(found - length * share).max() < LONGEST[num_sets]
    for position in (0, 1, 99, num):
        assert mixing.counts(position) == counts[position].tolist()


@pytest.mark.parametrize("num_sets", SIZES)
def test_own_positions_count_up_and_far_ones_are_exact(num_sets):
    mixing = mixing_of(num_sets)
    for start in (0, 10**6 + 7, 4 * 10**9):
        positions = np.arange(start, start + 500, dtype=np.int64)
        sets, own = mixing.split(positions)
        for number, before in enumerate(mixing.counts(start)):
            mine = own[sets == number]
            assert mine.tolist() == list(range(before, before + len(mine)))


def test_packs_are_those_of_each_set_by_itself():
    """A plain loop: a cursor for each set, which goes through its own permutation of each pass."""
    mixing = mixing_of(3)
    positions = np.arange(400, dtype=np.int64)
    sets, _ = mixing.split(positions)
    packs = mixing.packs(positions, seed=5)
    golden = 0x9E3779B97F4A7C15
    cursors = [itertools.count() for _ in mixing.names]
    for one, pack in zip(sets.tolist(), packs.tolist(), strict=True):
        done, inside = divmod(next(cursors[one]), mixing.num_packs[one])
        expected = permute(np.array([inside]), mixing.num_packs[one], 5 + one * golden, done)
        assert pack == mixing.starts[one] + expected[0]
    assert mixing.set_of(packs).tolist() == sets.tolist()


def test_a_pass_sees_each_pack_once_and_the_next_another_order():
    mixing = mixing_of(2, shares=(WHOLE // 2, WHOLE // 2))
    packs = mixing.packs(np.arange(4 * 37, dtype=np.int64), seed=0)
    first, second = packs[packs < 37][:37], packs[packs < 37][37:]
    assert sorted(first) == sorted(second) == list(range(37))
    assert first.tolist() != second.tolist()


def test_weights_become_shares_of_packs():
    """Half of the tokens each, of sets whose packs hold 100 and 300 tokens: three packs to one."""
    assert shares_of([1, 1], [100, 300]) == (WHOLE * 3 // 4, WHOLE // 4)
    for weights in ([1, 1, 1], [1e-12, 1.0], [3, 5, 7, 11]):
        shares = shares_of(weights, [1.0] * len(weights))
        assert sum(shares) == WHOLE and min(shares) >= 1


def test_epochs_by_passes_and_by_packs():
    by_passes = mixing_of(2, shares=shares_of([1.0, 3.0], [1 / 37, 1 / 11]), passes=(1.0, 3.0))
    assert by_passes.positions(2.0) == 2 * (37 + 3 * 11)
    assert by_passes.counts(by_passes.positions(2.0)) == [2 * 37, 6 * 11]
    assert mixing_of(2).positions(1.5) == 72


@pytest.mark.parametrize("epochs", (1.0, 2.5, 0.3))
@pytest.mark.parametrize("num_sets", SIZES)
def test_stopping_ends_with_the_first_set_that_is_done(num_sets, epochs):
    mixing = mixing_of(num_sets, stops=True)
    positions = mixing.positions(epochs)
    most = [round(epochs * size) or 1 for size in mixing.num_packs]
    assert all(count <= bound for count, bound in zip(mixing.counts(positions), most, strict=True))
    assert any(count > bound for count, bound in zip(mixing.counts(positions + 1), most, strict=True))
    assert abs(positions - epochs * mixing.epoch) < mixing.epoch  # a set's last pack is rounded to


def test_one_set_is_the_plain_stream():
    index = Index(**{name: np.arange(1, 24) for name in INDEX_SCHEMA.names})
    settings = {"seed": 3, "epochs": 2.4, "packs_per_step": 5, "world_size": 2, "cost": PackCost()}
    plain = Plan(index, **settings)
    only = Mixing(names=("a",), num_packs=(23,), shares=(WHOLE,), passes=(1.0,))
    mixed = Plan(replace(index, mixed=only), **settings)
    assert (plain.num_steps, plain.steps_per_epoch) == (mixed.num_steps, mixed.steps_per_epoch)
    for step in range(plain.num_steps):
        assert plain.packs_of(step).tolist() == mixed.packs_of(step).tolist()
        assert plain.step(step).packs.tolist() == mixed.step(step).packs.tolist()
    assert length_of(Mixing.alone(23), 2.4, 5, None) == (55, 11)
