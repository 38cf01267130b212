"""The memory that ZeRO is said to keep, against what real DeepSpeed processes keep: 2 ranks, every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, tiny_config, write_packs
from vltrain.errors import InputError
from vltrain.memory.weights import WeightPlan
from vltrain.memory.zero import Parameter, ZeroMemory, zero_memory
from vltrain.models.build import build_model
from vltrain.train.optim import parameter_groups

WORLD_SIZE = 2
PACKS_PER_STEP = 4


def ds_json(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 20_000, "overlap_comm": True, **more}
    return {"zero_optimization": zero | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {})}


SCENARIOS = {
    "adapters-2": (ds_json(2), "adapters"),
    **{f"full-{stage}": (ds_json(stage), "full") for stage in range(4)},
}


def planned(ds: dict[str, Any], tune: str) -> ZeroMemory:
    config = tiny_config(model__tune=tune)
    model = build_model(config.model, device="meta")
    weights = WeightPlan(model, None, torch.float32)
    groups = parameter_groups(model.named_parameters(), config.optim, model.part_of)
    return zero_memory(
        ds | {"gradient_accumulation_steps": PACKS_PER_STEP // WORLD_SIZE},
        WORLD_SIZE,
        frozen=weights.frozen_by_kind(),
        groups=[[weights.as_kept(parameter) for parameter in group["params"]] for group in groups],
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """By scenario, what each rank keeps."""
    file = tmp_path_factory.mktemp("zero") / "scenarios.json"
    write_packs(Path(f"{file}.packs"), make_segments(12))
    changes = {
        name: {"model__tune": tune, "train__packs_per_step": PACKS_PER_STEP} for name, (_, tune) in SCENARIOS.items()
    }
    file.write_text(json.dumps([[name, ds, changes[name]] for name, (ds, _) in SCENARIOS.items()]))
    run_ranks("tests.memory.zero_worker", [str(file)], WORLD_SIZE, Path(f"{file}.log"), timeout_seconds=300)
    return {
        name: [json.loads(Path(f"{file}.{name}.{rank}").read_text()) for rank in range(WORLD_SIZE)]
        for name in SCENARIOS
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_planned_is_what_deepspeed_keeps(name: str, measured: dict[str, list[dict[str, int]]]) -> None:
    """To the byte, on the rank that keeps most; but ZeRO-2's second set of gradients, which is gone when the last
    backward ends."""
    expected = {**planned(*SCENARIOS[name]).held}
    if name.endswith("2"):
        expected["gradients"] //= 2
    found = {kind: max(rank[kind] for rank in measured[name]) for kind in measured[name][0]}
    assert found == {kind: expected.get(kind, 0) for kind in found} and sum(found.values()) == sum(expected.values())


def test_one_group_by_hand() -> None:
    """10 numbers on 3 ranks: padded to 12 in flat partitions of 4, at stage 3 each parameter by itself."""
    arguments: dict[str, Any] = {
        "groups": [[Parameter(7, 28), Parameter(3, 12)]],
        "frozen": {"bf16": [Parameter(5, 10)]},
    }
    stage_2 = zero_memory({"zero_optimization": {"stage": 2, "reduce_bucket_size": 6}}, 3, **arguments)
    assert stage_2.held == {
        "frozen weights, bf16": 10,
        "trained weights": 48,
        "gradients": 40,
        "master weights": 16,
        "optimizer states": 32,
    }  # the middle rank's four numbers lie in both parameters
    assert (stage_2.at_work, stage_2.in_step) == ({"reduce buckets": 24}, {"gradients for the step": 16})
    zero = {"stage": 3, "reduce_bucket_size": 6, "stage3_param_persistence_threshold": 3}
    stage_3 = zero_memory({"zero_optimization": zero}, 3, **arguments)
    assert stage_3.held == {
        "frozen weights, bf16": 4,
        "trained weights": 16,
        "small weights kept whole": 12,
        "reduce buckets": 24,
        "master weights": 16,
        "optimizer states": 32,
        "gradients": 16,
    }
    assert stage_3.at_work == {"gathered weights": 28 + 10}


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_moves_states_to_the_host(stage: int) -> None:
    groups, frozen = [[Parameter(600, 2400)]], {"bf16": [Parameter(1000, 2000)]}
    zero = {"stage": stage, "reduce_bucket_size": 10}
    kept = zero_memory({"zero_optimization": zero}, 2, groups=groups, frozen=frozen)
    moved = zero_memory(
        {"zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}}, 2, groups=groups, frozen=frozen
    )
    assert {"optimizer states": 2400, "master weights": 1200}.items() <= moved.host.items() and not kept.host
    assert not {"optimizer states", "master weights"} & moved.held.keys()
    assert sum(moved.held.values()) < sum(kept.held.values())


def test_what_is_not_planned_for_is_refused() -> None:
    hpz, misplaced = {"stage": 3, "zero_hpz_partition_size": 8}, {"stage": 2, "offload_param": {"device": "cpu"}}
    for zero, said in ((hpz, "zero_hpz_partition_size"), (misplaced, "stage 3")):
        with pytest.raises(InputError, match=said):
            zero_memory({"zero_optimization": zero}, 8, groups=[[Parameter(8, 32)]], frozen={})
