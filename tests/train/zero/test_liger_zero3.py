"""Liger under ZeRO-3, whose hooks replace the tensors between modules: what the log says is what runs, in each layer
and each recomputation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: bash launch/setup_env.sh --with test")
LAYERS, STEPS = 2, 2
CHANGES = {
    "train__packs_per_step": 1,
    "train__max_steps": STEPS,
    "train__save_every_steps": 1000,
    "model__tune": "full",
    "model__adapter__llm": "none",
    "train__log_every_steps": 1,
}


def test_each_layer_calls_ligers_rotary_embedding(tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(2))
    scenarios = {}
    for kernels in ("liger", "torch"):
        for checkpointing in (False, True):
            output = tmp_path / f"{kernels}-{checkpointing}"
            changes = {**CHANGES, "model__llm__kernels": kernels, "train__activation_checkpointing": checkpointing}
            scenarios[kernels, checkpointing] = {
                "packs": str(packs),
                "output": str(output),
                "ds": {"zero_optimization": {"stage": 3}},
                "changes": changes,
            }
    (tmp_path / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    run_ranks("tests.train.zero.liger_worker", [str(tmp_path / "scenarios.json")], 1, tmp_path / "log")
    results = {key: load_file(tmp_path / f"{key[0]}-{key[1]}" / "result.safetensors") for key in scenarios}
    for (kernels, checkpointing), scenario in scenarios.items():
        calls = json.loads((tmp_path / f"{kernels}-{checkpointing}" / "calls.json").read_text())
        forwards = STEPS * LAYERS * (2 if checkpointing else 1)
        if kernels == "torch":
            assert calls == {"plain": forwards}, "a model without Liger got its kernels"
            continue
        assert calls == {
            "LigerRopeFunction": forwards,
            "LigerSiLUMulFunction": forwards,
            "LigerRMSNormFunction": 2 * forwards + STEPS,
        }, scenario
        torch.testing.assert_close(
            results["liger", checkpointing]["losses"], results["torch", checkpointing]["losses"], rtol=1e-5, atol=0
        )
