"""The plan of steps: a permutation without memory, the same global batch at any number of ranks, every pack once an
epoch."""

import numpy as np
import pytest

from vltrain.data.flat.index import Index
from vltrain.data.packing import pack_lengths
from vltrain.data.plan import PackCost, Plan
from vltrain.data.stream.permutation import permute


def index_of(num_packs: int, seed: int = 0) -> Index:
    generator = np.random.default_rng(seed)
    return Index(
        num_tokens=generator.integers(10, 100, num_packs),
        num_label_tokens=generator.integers(1, 10, num_packs),
        num_images=generator.integers(0, 3, num_packs),
        num_samples=generator.integers(1, 5, num_packs),
        sum_squares=generator.integers(100, 9999, num_packs),
    )


def plan_of(index, world_size=1, **changes) -> Plan:
    settings = {"seed": 3, "epochs": 2.0, "packs_per_step": 5, "cost": PackCost(), **changes}
    return Plan(index, world_size=world_size, **settings)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 65, 1000])
def test_permute_is_a_bijection_that_depends_on_seed_and_epoch(n):
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(n)) for order in orders)
    if n > 16:
        assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_the_global_batch_does_not_depend_on_the_ranks(world_size):
    index = index_of(23)
    one, many = plan_of(index), plan_of(index, world_size)
    assert one.num_steps == many.num_steps == 10  # 46 packs, five a step, the last step has one
    for step in range(one.num_steps):
        first, second = one.step(step), many.step(step)
        assert sorted(first.packs[first.packs >= 0]) == sorted(second.packs[second.packs >= 0])
        assert first.num_label_tokens == second.num_label_tokens == index.num_label_tokens[first.packs].sum()
        expected = [any(pack >= 0 and index.num_images[pack] > 0 for pack in row) for row in second.packs]
        assert second.has_images.tolist() == expected


def test_every_pack_once_an_epoch():
    plan = plan_of(index_of(23))
    stream = np.concatenate([plan.packs_of(step) for step in range(plan.num_steps)])
    assert sorted(stream[:23]) == sorted(stream[23:]) == list(range(23))


def test_offload_reaches_the_vit_in_every_micro_step():
    index = index_of(23)
    index.num_images[:] = 0
    assert not plan_of(index, 2).step(0).has_images.any()
    assert plan_of(index, 2, images_always=True).step(0).has_images.all()


@pytest.mark.parametrize(("low", "high", "capacity"), [(20, 28, 1024), (30, 480, 512)])
def test_packing_holds_everything_once_within_the_capacity_and_full(low, high, capacity):
    lengths = np.random.default_rng(0).integers(low, high, 20_000)
    order, starts = pack_lengths(lengths, capacity, None, None, 0)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[order], starts[:-1])
    assert sums.max() <= capacity
    assert lengths.sum() / (capacity * len(sums)) >= 0.99
    again, _ = pack_lengths(lengths, capacity, None, None, 0)
    assert np.array_equal(order, again)


def packs_of_two_kinds(num_samples: int, long: int, capacity: int) -> np.ndarray:
    """How many samples of the second kind, `long` tokens where the first has 10, each full pack holds, as a share; half
    of all are of it."""
    lengths = np.where(np.arange(num_samples) % 2, long, 10)
    order, starts = pack_lengths(lengths, capacity, None, None, 0)
    assert sorted(order.tolist()) == list(range(num_samples))
    return np.array(
        [np.mean(lengths[order[first:last]] == long) for first, last in zip(starts, starts[1:]) if last - first > 2]
    )


@pytest.mark.parametrize(("num_samples", "long"), [(40, 30), (100, 30), (126, 30), (60, 25), (127, 17)])
def test_few_samples_are_mixed_as_well_as_many(num_samples, long):
    few, many = packs_of_two_kinds(num_samples, long, 200), packs_of_two_kinds(6000, long, 200)
    assert len(few) >= 2 and 0 < few.min() and few.max() < 1  # best fit would sort them: packs of one kind
    assert few.std() <= 1.25 * many.std()


@pytest.mark.parametrize(("num_samples", "max_images"), [(1, None), (2, 1), (3, 2), (17, 2), (90, 3), (127, None)])
def test_few_samples_take_no_more_packs_than_best_fit_and_keep_every_bound(num_samples, max_images):
    generator = np.random.default_rng(num_samples)
    lengths, images = generator.integers(1, 101, num_samples), generator.integers(0, 2, num_samples)
    order, starts = pack_lengths(lengths, 100, images, max_images, 3)
    assert sorted(order.tolist()) == list(range(num_samples)) and (np.diff(starts) > 0).all()
    assert np.add.reduceat(lengths[order], starts[:-1]).max() <= 100
    assert max_images is None or np.add.reduceat(images[order], starts[:-1]).max() <= max_images
    rooms: list[list[int]] = []
    for length, shown in sorted(zip(lengths.tolist(), images.tolist()), reverse=True):
        fitting = [room for room in rooms if room[0] >= length and (max_images is None or room[1] >= shown)]
        if not fitting:
            rooms.append(fitting := [100, max_images or 0])
            fitting = [fitting]
        least = min(fitting)
        least[0], least[1] = least[0] - length, least[1] - shown
    assert len(starts) - 1 <= len(rooms)
    assert np.array_equal(order, pack_lengths(lengths, 100, images, max_images, 3)[0])
