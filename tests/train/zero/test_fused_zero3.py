"""The adapter's kernel takes in the LLM's norms under ZeRO-3 too, whose weights are then gathered for it: one
arithmetic at every stage."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs

pytest.importorskip("triton", reason="triton is not installed")
LLM_LAYERS, VIT_LAYERS, STEPS = 2, 4, 2
CHANGES = {
    "train__packs_per_step": 1,
    "train__max_steps": STEPS,
    "train__save_every_steps": 1000,
    "train__log_every_steps": 1,
    "model__adapter__impl": "triton",
}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_zero_3_computes_what_zero_2_does(tmp_path, world_size):
    packs = write_packs(
        tmp_path / "packs", make_segments(2)
    )  # one with images in two of its segments, one with an image
    scenarios = {}
    for stage in (2, 3):
        for checkpointing in (False, True):
            zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
            scenarios[stage, checkpointing] = {
                "packs": str(packs),
                "output": str(tmp_path / f"{stage}-{checkpointing}"),
                "ds": {"zero_optimization": zero},
                "changes": {**CHANGES, "train__precision": "bf16", "train__activation_checkpointing": checkpointing},
            }
    (tmp_path / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    run_ranks("tests.train.zero.fused_worker", [str(tmp_path / "scenarios.json")], world_size, tmp_path / "log")
    for (stage, checkpointing), scenario in scenarios.items():
        calls = json.loads((tmp_path / f"{stage}-{checkpointing}" / "calls.json").read_text())
        forwards = STEPS * (2 if checkpointing else 1)
        assert calls["norm"] == forwards * LLM_LAYERS, f"ZeRO {stage}: {calls}"
        assert calls["no norm"] == forwards * VIT_LAYERS, f"ZeRO {stage}: {calls}"
        found, expected = (
            load_file(tmp_path / f"{number}-{checkpointing}" / "result.safetensors") for number in (stage, 2)
        )
        assert torch.equal(found["losses"], expected["losses"])
