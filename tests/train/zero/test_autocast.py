"""Real DeepSpeed in bf16 as it runs on CUDA: it sees autocast there, which on CPU ranks it does not, and switches off
what stands around its forward.

Losses and gradient norms are bit for bit those of the same run in which it sees none, at every ZeRO stage, and on one
rank those of every other stage, too: the order of sums is the same.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.blip import blip_config, make_samples
from tests.support.kinds import tokenizer_of
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.data.text.conversation import encode_sample
from vltrain.models.adapters.table import ADAPTERS

CHANGES = {
    "train__packs_per_step": 2,
    "train__max_steps": 4,
    "train__epochs": 10.0,
    "train__save_every_steps": 1000,
    "train__precision": "bf16",
}
CHECKPOINTED = {"train__activation_checkpointing": True}
STAGES = (0, 1, 2, 3)


def adapter(kind: str) -> dict:
    wide = {"model__adapter__dim": 16} if kind in ("loha_silu", "loha_weighted") else {}
    return {"model__adapter__kind": kind, **wide}


def ds_of(stage: int) -> dict:
    zero = {
        "stage": stage,
        "reduce_bucket_size": 500,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }
    return {"zero_optimization": zero}


WAYS = {
    "full": {"changes": {"model__tune": "full"}},
    "llama": {"blip": "llama"},
    "router": {"changes": adapter("router")},
}


def blip_packs(folder, kind: str):
    tokenizer, config = tokenizer_of(kind), blip_config(kind)
    segments = [encode_sample(sample, tokenizer, config.data.template, 4) for sample in make_samples(12)]
    return write_packs(folder, [segments[start : start + 3] for start in range(0, 12, 3)])


def run(folder, cases: dict[str, dict]) -> dict[tuple[str, int, bool], dict[str, torch.Tensor]]:
    """Every case at its stages, or else at every stage, with the flag and without, in one process: {(case, stage,
    flag): result}."""
    packs = {None: write_packs(folder / "packs", make_segments(8))}
    packs |= {
        kind: blip_packs(folder / f"packs-{kind}", kind)
        for kind in {case.get("blip") for case in cases.values()} - {None}
    }
    told = [
        {
            **{key: value for key, value in case.items() if key == "blip"},
            "name": name,
            "flag": flag,
            "ds": ds_of(stage),
            "packs": str(packs[case.get("blip")]),
            "changes": {**CHANGES, **case.get("changes", {})},
            "output": str(folder / f"{name}-{stage}-{flag}"),
        }
        for name, case in cases.items()
        for stage in case.get("stages", STAGES)
        for flag in (False, True)
    ]
    (folder / "scenarios.json").write_text(json.dumps(told))
    run_ranks(
        "tests.train.zero.autocast_worker", [str(folder / "scenarios.json")], 1, folder / "log", timeout_seconds=1200
    )
    return {
        (one["name"], one["ds"]["zero_optimization"]["stage"], one["flag"]): load_file(
            f"{one['output']}/result.safetensors"
        )
        for one in told
    }


def assert_equal(results: dict[tuple[str, int, bool], dict[str, torch.Tensor]]) -> None:
    """All results of a case: of the same stage, losses and weights bit for bit; of different stages the losses of two
    steps, and the others nearly.
    (AdamW walks over flat parts of the weights from stage 1 on, whose ends a CPU's vectors round otherwise.)"""
    for (name, stage, flag), found in results.items():
        expected = results.get((name, 0, False), results[name, stage, False])
        assert torch.isfinite(found["losses"]).all() and len(found["losses"]) == 4
        what = f"{name} at stage {stage}, flag {flag}: {found['losses']} {expected['losses']}"
        assert torch.equal(found["losses"], results[name, stage, False]["losses"]), what
        assert torch.equal(found["losses"][:2], expected["losses"][:2]), what
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=0, msg=what)
        for key in (key for key in found if key.startswith("weight/")):
            assert torch.equal(found[key], results[name, stage, False][key]), (
                f"{name} at stage {stage}, flag {flag}: {key}"
            )


@pytest.mark.slow
def test_as_on_cuda_every_stage_and_way_of_tuning_gives_the_same_bits(tmp_path):
    """Ways other than adapters at the stage that cuts weights up. Checkpointed blocks, too, equal those that keep their
    activations."""
    cases = {"checkpointed": {"changes": CHECKPOINTED}, **WAYS}
    results = run(tmp_path, {"adapters": {}} | {name: {**case, "stages": (3,)} for name, case in cases.items()})
    assert_equal(results)
    assert torch.equal(results["checkpointed", 3, False]["losses"], results["adapters", 0, False]["losses"])


@pytest.mark.slow
def test_as_on_cuda_every_kind_of_adapter_gives_the_same_bits(tmp_path):
    cases = {kind: {"changes": adapter(kind)} for kind in ADAPTERS}
    cases |= WAYS | {"checkpointed": {"changes": CHECKPOINTED}}
    cases |= {"lora": {"changes": {"model__llm__peft__kind": "lora", "model__adapter__llm": "none", **CHECKPOINTED}}}
    cases |= {
        "t5": {"blip": "t5"},
        "llama-full": {"blip": "llama", "changes": {"vision": "full", "qformer__mode": "full", "llm__mode": "full"}},
    }
    assert_equal(run(tmp_path, cases))
