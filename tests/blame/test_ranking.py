"""What a history says of samples, beside plain loops over a made-up run whose steps reach over passes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import make_segments, write_packs
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.programs.blame.ranking import RIGHT, Place, SampleHistory, spike
from vltrain.receipts.history import HistoryWriter, read_history
from vltrain.receipts.receipt import Header

NUM_PACKS, PER_STEP, EPOCHS, NUM_STEPS, FIRST = 7, 5, 4.0, 6, 1
Losses = dict[Place, list[tuple[int, float]]]


@pytest.fixture
def world(tmp_path: Path) -> tuple[SampleHistory, Losses, dict[int, float]]:
    """A history that begins at step 1, in which a sample has no label and one comes twice in a step; what it says by
    sample, and each step's median."""
    dataset = PackedDataset(write_packs(tmp_path / "packs", make_segments(NUM_PACKS)))
    header = Header(
        run="r",
        data=dataset.manifest.checksum,
        packs="",
        seed=3,
        epochs=EPOCHS,
        packs_per_step=PER_STEP,
        num_steps=NUM_STEPS,
    )
    plan = Plan(dataset.index, seed=3, epochs=EPOCHS, packs_per_step=PER_STEP, world_size=1, cost=PackCost())
    writer = HistoryWriter(tmp_path, run="r", data=header.data, active=True, first_step=FIRST)
    draw = np.random.default_rng(0)
    seen: Losses = {}
    medians = {}
    for step in range(FIRST, NUM_STEPS):
        places = [
            Place(pack, at) for pack in plan.packs_of(step).tolist() for at in range(len(dataset.sample_ids(pack)))
        ]
        losses = draw.exponential(1.0, len(places)).astype(np.float32)
        losses[[place == Place(0, 1) for place in places]] = np.nan
        writer.add(losses)
        medians[step] = float(np.median(losses[~np.isnan(losses)]))
        for place, loss in zip(places, losses.tolist(), strict=True):
            seen.setdefault(place, []).append((step, loss))
    writer.close()
    return SampleHistory(read_history(tmp_path), header, dataset), seen, medians


def test_scores_are_those_of_a_plain_loop(world):
    samples, seen, medians = world
    scores = samples.scores()
    assert any(len({step for step, _ in times}) < len(times) for times in seen.values()), "one comes twice in a step"
    for number in range(samples.num_samples):
        place = samples.place(number)
        times = [(step, loss) for step, loss in seen.get(place, []) if not math.isnan(loss)]
        assert samples.number(place) == number and scores.passes[number] == len(times)
        if not times:
            assert math.isnan(scores.suspicion[number]) and number not in scores.suspects()
            continue
        losses = [loss for _, loss in times]
        assert scores.suspicion[number] == pytest.approx(
            np.mean([loss - medians[step] for step, loss in times]), abs=1e-5
        )
        assert scores.last[number] == losses[-1]
        assert scores.lowest[number] == min(losses[:-1], default=np.inf)
        forgotten = len(losses) > 1 and min(losses[:-1]) < RIGHT < losses[-1]
        assert (number in scores.forgotten()) == forgotten
    order = scores.suspicion[scores.suspects()]
    assert (np.diff(order) <= 0).all() and (np.diff(scores.rise[scores.forgotten()]) <= 0).all()
    assert 0 < len(scores.forgotten()) < len(order) < samples.num_samples


def test_each_time_that_a_sample_was_seen(world):
    samples, seen, _ = world
    asked = [Place(0, 1), *list(seen)[:5]]
    for place, times in samples.seen(asked).items():
        assert [step for step, _ in times] == [step for step, _ in seen[place]]
        np.testing.assert_array_equal([loss for _, loss in times], [loss for _, loss in seen[place]])


def test_a_history_of_other_packs_is_refused(world, tmp_path):
    samples, _, _ = world
    other = PackedDataset(write_packs(tmp_path / "other", make_segments(NUM_PACKS + 2, seed=5)))
    header = Header(run="r", data="", packs="", seed=3, epochs=EPOCHS, packs_per_step=PER_STEP, num_steps=NUM_STEPS)
    with pytest.raises(InputError, match="step 1: .* losses, its packs have .* samples"):
        SampleHistory(read_history(tmp_path), header, other).scores()
    short = Header(run="r", data="", packs="", seed=3, epochs=EPOCHS, packs_per_step=PER_STEP, num_steps=3)
    with pytest.raises(InputError, match="holds step 5, the run has 3 steps"):
        SampleHistory(read_history(tmp_path), short, other)


def test_the_spike_is_the_largest_jump_over_the_mean_before():
    flat = dict.fromkeys(range(80), 2.0)
    assert spike({**flat, 60: 5.0, 70: 4.0}) == (60, 5.0, 2.0)
    assert spike({**flat, 5: 100.0})[0] != 5, "ten losses come before"
    late = dict.fromkeys(range(60, 80), 0.01)
    step, loss, before = spike({**flat, **late, 79: 1.5})
    assert (step, loss) == (79, 1.5) and before == pytest.approx((31 * 2.0 + 19 * 0.01) / 50)
    assert spike({**flat, 60: 50.0, 70: math.nan})[0] == 70, "what is not finite jumps furthest"
    with pytest.raises(InputError, match="--spike: the run's log has 10 steps, expected more than 10"):
        spike(dict.fromkeys(range(10), 1.0))
