"""The adapter's kernel takes in the norms before it under ZeRO-3 too, whose weights are then gathered for it: one
arithmetic at every stage, of mmt and of stock models."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from tests.train.plain_loop import relative_difference
from tests.train.zero.stock_worker import STEPS as STOCK_STEPS
from tests.train.zero.test_equivalence import TOLERANCE, stage
from tests.train.zero.test_stock_equivalence import GRADIENT_TOLERANCE

pytest.importorskip("triton", reason="triton is not installed")
LLM_LAYERS, VIT_LAYERS, STEPS = 2, 4, 2
CHANGES = {
    "train__packs_per_step": 1,
    "train__max_steps": STEPS,
    "train__save_every_steps": 1000,
    "train__log_every_steps": 1,
    "model__adapter__impl": "triton",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_stock_models_norms_are_gathered_too(family: str, tmp_path) -> None:
    """The norms of Qwen's tower and LLM, and Gemma's, whose weight is one less."""
    adapter = {"adapter.vision": "both", "adapter.llm": "both", "adapter.dim": 4}
    scenarios = {
        name: {
            "family": family,
            "changes": {**adapter, "adapter.impl": impl},
            "ds": stage(number),
            "checkpointing": checkpointing,
            "output": str(tmp_path / name / "result"),
        }
        for name, impl, number, checkpointing in (
            ("plain", "torch", 2, False),
            ("zero2", "triton", 2, False),
            ("zero3", "triton", 3, False),
            ("checkpointed", "triton", 3, True),
        )
    }
    (tmp_path / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    run_ranks("tests.train.zero.fused_stock_worker", [str(tmp_path / "scenarios.json")], 2, tmp_path / "log")
    calls = {name: json.loads((tmp_path / name / "calls.json").read_text()) for name in scenarios}
    assert not calls["plain"] and calls["zero3"] == calls["zero2"] and calls["zero2"]["norm"] >= 4 * STOCK_STEPS
    assert calls["checkpointed"]["norm"] == 2 * calls["zero3"]["norm"]
    expected = load_file(tmp_path / "plain" / "result.safetensors")
    for name in ("zero2", "zero3", "checkpointed"):
        found = load_file(tmp_path / name / "result.safetensors")
        assert relative_difference(found["losses"], expected["losses"]) <= TOLERANCE, name
        for key, value in expected.items():
            if key.startswith("gradient/"):
                off, size = float((found[key] - value).norm()), float(value.norm())
                # Gemma's projector begins as zero, and so does the tower's gradient.
                assert off <= GRADIENT_TOLERANCE * size, f"{name}: {key}: {off:.1e} of {size:.1e}"


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_zero_3_computes_what_zero_2_does(tmp_path, world_size):
    packs = write_packs(
        tmp_path / "packs", make_segments(2)
    )  # one with images in two of its segments, one with an image
    scenarios = {}
    for number in (2, 3):
        for checkpointing in (False, True):
            zero = {"stage": number, **({"stage3_param_persistence_threshold": 0} if number == 3 else {})}
            scenarios[number, checkpointing] = {
                "packs": str(packs),
                "output": str(tmp_path / f"{number}-{checkpointing}"),
                "ds": {"zero_optimization": zero},
                "changes": {**CHANGES, "train__precision": "bf16", "train__activation_checkpointing": checkpointing},
            }
    (tmp_path / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    run_ranks("tests.train.zero.fused_worker", [str(tmp_path / "scenarios.json")], world_size, tmp_path / "log")
    for (number, checkpointing), scenario in scenarios.items():
        calls = json.loads((tmp_path / f"{number}-{checkpointing}" / "calls.json").read_text())
        forwards = STEPS * (2 if checkpointing else 1)
        assert calls["norm"] == forwards * LLM_LAYERS, f"ZeRO {number}: {calls}"
        assert calls["no norm"] == forwards * VIT_LAYERS, f"ZeRO {number}: {calls}"
        found, expected = (load_file(tmp_path / f"{one}-{checkpointing}" / "result.safetensors") for one in (number, 2))
        assert torch.equal(found["losses"], expected["losses"])
