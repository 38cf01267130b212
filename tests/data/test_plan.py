"""The plan of steps: a permutation without memory, the same global batch at any number of ranks, every pack once an epoch."""

import numpy as np
import pytest

from vltrain.data.packing import pack_lengths
from vltrain.data.plan import PackCost, Plan, permute
from vltrain.data.shards import Index


def index_of(num_packs: int, seed: int = 0) -> Index:
    generator = np.random.default_rng(seed)
    return Index(
        num_tokens=generator.integers(10, 100, num_packs), num_label_tokens=generator.integers(1, 10, num_packs),
        num_images=generator.integers(0, 3, num_packs), num_samples=generator.integers(1, 5, num_packs), sum_squares=generator.integers(100, 9999, num_packs),
    )  # fmt: skip


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
