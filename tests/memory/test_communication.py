"""What ranks are said to send each other, against DeepSpeed's own log of communication: 2 ranks, every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory.test_zero import ds_json
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, tiny_config, write_packs
from vltrain.memory.communication import Communication, communication
from vltrain.memory.weights import WeightPlan
from vltrain.memory.zero import Parameter
from vltrain.models.build import build_model, count_trained

WORLD_SIZE = 2
NO_REUSE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
SCENARIOS = {
    **{f"stage-{stage}": (ds_json(stage), 4) for stage in range(4)},
    "stage-3-one-micro-step": (ds_json(3), 2),
    "stage-3-without-reuse": (ds_json(3, **NO_REUSE), 4),
}
SMALL = 16  # bytes: of the gradient's norm and a flag


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """By scenario, what each rank's log says of a step in which every pack has images."""
    file = tmp_path_factory.mktemp("communication") / "scenarios.json"
    write_packs(Path(f"{file}.packs"), [pack for pack in make_segments(48) if any(one.images for one in pack)])
    file.write_text(
        json.dumps([[name, ds, {"train__packs_per_step": packs}] for name, (ds, packs) in SCENARIOS.items()])
    )
    run_ranks("tests.memory.communication_worker", [str(file)], WORLD_SIZE, Path(f"{file}.log"), timeout_seconds=300)
    return {
        name: [json.loads(Path(f"{file}.{name}.{rank}").read_text()) for rank in range(WORLD_SIZE)]
        for name in SCENARIOS
    }


def planned(ds: dict[str, Any], packs_per_step: int) -> Communication:
    model = build_model(tiny_config().model, device="meta")
    weights = WeightPlan(model, None, torch.float32)
    return communication(
        ds,
        WORLD_SIZE,
        micro_steps=packs_per_step // WORLD_SIZE,
        num_trained=count_trained(model),
        partitioned=[weights.as_kept(one) for one in model.parameters()],
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_planned_is_what_deepspeed_sends(name: str, measured: dict[str, list[dict[str, int]]]) -> None:
    """To the byte of gradients and updated weights; of weights that stage 3 gathers no more than planned, and no less
    than without those that need no backward."""
    expected = planned(*SCENARIOS[name])
    for logged in measured[name]:
        # The log has each rank's part of an all-gather, and the whole of the others.
        gathered = WORLD_SIZE * logged.get("all_gather_into_tensor", 0)
        assert 0 <= logged.get("all_reduce", 0) - expected.all_reduce <= SMALL
        assert logged.get("reduce_scatter_tensor", 0) == expected.reduce_scatter
        if "stage-3" in name:
            assert 0.8 * expected.all_gather <= gathered <= expected.all_gather
        else:
            assert gathered == expected.all_gather


def test_what_a_rank_sends_by_hand() -> None:
    """1000 numbers on 4 ranks, 3 micro-steps; at stage 3 beside them 4000 in bf16, of which 10 are kept whole."""
    weights = [Parameter(1000, 4000), Parameter(3990, 7980), Parameter(10, 20)]

    def sent(stage: int, **more: int) -> int:
        ds = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10, **more}}
        found = communication(ds, 4, micro_steps=3, num_trained=1000, partitioned=weights)
        return found.sent(4)

    assert sent(0) == 2 * 4000 * 3 // 4
    assert sent(1) == (2 * 4000 + 4000) * 3 // 4
    assert sent(2) == (2 * 3 * 4000 + 4000) * 3 // 4
    assert sent(3, **NO_REUSE) == (2 * 3 * 11980 + 3 * 4000) * 3 // 4
    assert sent(3) == (3 * 11980 + 3 * 4000) * 3 // 4
    assert communication({"zero_optimization": {"stage": 3}}, 1, micro_steps=3, num_trained=9) == Communication()
