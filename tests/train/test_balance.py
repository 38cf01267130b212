"""`train.balance measured`: seconds are explained by what packs hold, ranks share by them, and nothing else changes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.data.flat.index import Index
from vltrain.data.plan import PackCost, Plan
from vltrain.train.balance import COEFFICIENTS, MEASURED, choose_packs, features_of, fit_seconds, fitted
from vltrain.train.checkpoints.checkpoint import Checkpoint, newest_checkpoint

SECONDS = np.array([0.02, 1e-3, 2e-7, 0.3, 5e-4])  # a pack, token, pair, image, label token


def index_of(num_packs: int) -> Index:
    generator = np.random.default_rng(num_packs)
    return Index(
        num_tokens=generator.integers(700, 1024, num_packs),
        num_label_tokens=generator.integers(20, 200, num_packs),
        num_images=generator.integers(0, 6, num_packs),
        num_samples=generator.integers(1, 5, num_packs),
        sum_squares=generator.integers(100_000, 1_000_000, num_packs),
    )


def test_the_fit_finds_the_seconds_of_which_packs_are_made():
    index = index_of(400)
    features = features_of(index, PackCost(), np.arange(400))
    chosen = choose_packs(features, 12)
    assert len(set(chosen.tolist())) == 12
    assert fit_seconds(features[chosen], features[chosen] @ SECONDS) == pytest.approx(SECONDS, rel=1e-6)


def test_no_coefficient_is_negative_and_noise_is_small_where_packs_are_predicted():
    index = index_of(400)
    features = features_of(index, PackCost(), np.arange(400))
    chosen = choose_packs(features, 12)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(1.0, 0.02, len(chosen))
        found = fit_seconds(features[chosen], features[chosen] @ SECONDS * noise)
        assert (found >= 0).all()
        assert np.abs(features @ found / (features @ SECONDS) - 1).mean() < 0.03


def test_packs_that_are_measured_are_the_extremes():
    features = np.array([[1, 10, 0], [1, 90, 5], [1, 50, 2], [1, 90, 0], [1, 10, 5], [1, 51, 2]], np.float64)
    assert sorted(choose_packs(features, 4).tolist()) == [0, 1, 3, 4]
    assert len(choose_packs(np.ones((5, 3)), 4)) == 1, "equal packs are measured once"


def test_errors_are_told_beside_those_of_flops():
    index = index_of(50)
    packs = np.arange(50)
    by_tokens = fitted(index, PackCost(), packs, 3.0 * index.num_tokens)
    assert by_tokens.error == pytest.approx(0, abs=1e-9) == by_tokens.error_of_flops
    by_images = fitted(index, PackCost(), packs, 1.0 + index.num_images)
    assert by_images.error < 1e-9 < 0.1 < by_images.error_of_flops


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_by_the_cost_that_holds_and_steps_stay_the_same(world_size):
    index = index_of(64)
    cost = PackCost(per_token=0.0, per_image=1.0)
    settings = {"seed": 3, "epochs": 2.0, "packs_per_step": 16, "world_size": world_size}
    by_tokens, by_images = Plan(index, cost=PackCost(), **settings), Plan(index, cost=cost, **settings)
    balanced = by_tokens.balanced_by(cost)
    differing = 0
    for number in range(balanced.num_steps):
        assert np.array_equal(balanced.step(number).packs, by_images.step(number).packs)
        assert sorted(balanced.step(number).packs.ravel()) == sorted(by_tokens.step(number).packs.ravel())
        differing += not np.array_equal(balanced.step(number).packs, by_tokens.step(number).packs)
    assert differing > balanced.num_steps / 2


def test_a_run_that_measures_differs_in_nothing_and_goes_on_with_what_it_measured(tmp_path):
    """On two ranks with a pack each a step, sums of two are the same bits in either order."""
    packs = write_packs(tmp_path / "packs", make_segments(8))

    def scenario(stage, balance, **more):
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        changes = {"packs_per_step": 2, "max_steps": 6, "epochs": 10.0, "save_every_steps": 3, "keep_checkpoints": 2}
        return {
            "name": f"{balance}-{stage}",
            "packs": str(packs),
            "output": str(tmp_path / f"{balance}-{stage}"),
            "ds": {"zero_optimization": zero},
            "changes": {f"train__{name}": value for name, value in {**changes, "balance": balance}.items()},
            **more,
        }

    file = tmp_path / "scenarios.json"
    file.write_text(json.dumps([scenario(stage, balance) for stage in (0, 3) for balance in ("flops", "measured")]))
    run_ranks("tests.train.worker", [str(file)], 2, tmp_path / "log")
    for stage in (0, 3):
        plain, found = (load_file(tmp_path / f"{name}-{stage}/result.safetensors") for name in ("flops", "measured"))
        assert plain.keys() == found.keys()
        assert [name for name in plain if not torch.equal(plain[name], found[name])] == []
    assert MEASURED not in newest(tmp_path / "flops-0").run_state
    before = newest(tmp_path / "measured-0")
    cost = before.run_state[MEASURED]
    assert min(cost.values()) >= 0 < sum(cost[name] for name in COEFFICIENTS)
    assert cost != newest(tmp_path / "measured-3").run_state[MEASURED]

    shutil.rmtree(before.path)
    file.write_text(json.dumps([scenario(0, "measured", resume=True)]))
    run_ranks("tests.train.worker", [str(file)], 2, tmp_path / "log-again")
    again = newest(tmp_path / "measured-0")
    assert again.step == 6 and again.run_state[MEASURED] == cost


def newest(run: Path) -> Checkpoint:
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint
