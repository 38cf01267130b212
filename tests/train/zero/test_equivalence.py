"""The same losses, gradients and weights however the work is spread: ZeRO stage, ranks, accumulation, packing.

Everything is compared with a plain PyTorch loop in one process that feeds one sample at a time. Real DeepSpeed
processes over gloo.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from tests.train.plain_loop import plain_run, relative_difference
from vltrain.data.shards import PackedDataset

NUM_STEPS = 8
TOLERANCE = 1e-5  # of losses and norms
GRADIENT_TOLERANCE = (
    3e-5  # after some steps of AdamW, which divides by what was small; which CPU it is moves it by half
)
CHANGES = {
    "train__packs_per_step": 5,
    "train__max_steps": NUM_STEPS,
    "train__epochs": 10.0,
    "train__save_every_steps": 1000,
    "optim__warmup_epochs": 0.5,
}
ADAPTERS = {**CHANGES}
LORA = {
    **CHANGES,
    "model__llm__peft__kind": "lora",
    "model__adapter__llm": "none",
    "model__vision__peft__kind": "dora",
    "model__vision__peft__targets": ("k_proj", "fc2"),
}
PROMPTS = {**CHANGES, "model__llm__peft__kind": "adaption_prompt", "model__llm__peft__adapter_len": 3}
FULL = {**CHANGES, "model__tune": "full", "optim__clip": 0.5, "optim__lr": 1e-3}
CHECKPOINTED = {**FULL, "train__activation_checkpointing": True}
ROUTER = {**CHECKPOINTED, "model__tune": "adapters", "model__adapter__kind": "router"}

KINDS = {"adapters": ADAPTERS, "full": FULL, "lora": LORA, "prompts": PROMPTS, "checkpointed": CHECKPOINTED,
         "router": ROUTER}  # fmt: skip
# By number of ranks, what is trained at which ZeRO stages. All of it at ZeRO 3 on one rank: test_resume.py.
STAGES = {
    1: {"adapters": range(4), "full": (0,)},
    2: {"adapters": range(4), "full": (2,), "lora": (3,), "prompts": (3,), "checkpointed": (3,), "router": (3,)},
}
FURTHER = {"full": (0, 1, 3), "lora": (0, 2), "prompts": (0, 2), "router": (0,)}  # at two ranks, slow


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return write_packs(tmp_path_factory.mktemp("equivalence") / "packs", make_segments(14))


def assert_same(found, expected, what):
    """Losses, norms, and every gradient beside its own largest entry, or a thousandth of the model's largest: a
    router's, or a query's, is the small difference of large terms, whose rounding it carries."""
    least = max(value.abs().max().item() for name, value in expected.items() if name.startswith("gradient/")) / 1000
    worst = {name: relative_difference(found[name], expected[name]) for name in ("losses", "grad_norms")}
    worst |= {
        name: relative_difference(found[name], expected[name], least)
        for name in expected
        if name.startswith("gradient/")
    }
    bad = {
        name: value
        for name, value in worst.items()
        if not value <= (GRADIENT_TOLERANCE if name.startswith("gradient/") else TOLERANCE)
    }
    assert not bad, f"{what}: {bad}"


@pytest.fixture(scope="module")
def references(packs):
    torch.set_num_threads(1)
    return {kind: plain_run(packs, changes) for kind, changes in KINDS.items()}


def test_the_reference_learns_and_meets_every_kind_of_pack(references, packs):
    for reference in references.values():
        assert reference["losses"][-3:].mean() < reference["losses"][:3].mean()
        assert all(value.abs().max() > 0 for name, value in reference.items() if name.startswith("gradient/"))
    index = PackedDataset(packs).index
    assert (index.num_images > 0).any() and (index.num_images == 0).any()


def stage(number: int, **more) -> dict:
    # Small buckets, so that several reductions happen and ZeRO-3 really partitions.
    zero = {
        "stage": number,
        "reduce_bucket_size": 500,
        **({"stage3_param_persistence_threshold": 0} if number == 3 else {}),
        **more,
    }
    return {"zero_optimization": zero}


@pytest.mark.parametrize(
    "world_size, stages",
    [
        pytest.param(1, STAGES[1], marks=pytest.mark.slow, id="1"),
        pytest.param(2, STAGES[2], id="2"),
        pytest.param(2, FURTHER, marks=pytest.mark.slow, id="2-further"),
    ],
)
def test_every_stage_and_number_of_ranks_gives_the_plain_loops_losses_and_gradients(
    packs, references, tmp_path, world_size, stages
):
    """Five packs a step: one rank accumulates five micro-steps, two ranks three, the last with a filler."""
    scenarios = {
        f"{kind}-{number}": (stage(number), KINDS[kind]) for kind, numbers in stages.items() for number in numbers
    }
    for name, found in run_scenarios(packs, scenarios, world_size, tmp_path).items():
        assert_same(found, references[name.split("-")[0]], f"{name} on {world_size} rank(s)")


def run_scenarios(
    packs, scenarios: dict[str, tuple[dict, dict]], world_size: int, folder
) -> dict[str, dict[str, torch.Tensor]]:
    """Runs {name: (DeepSpeed configuration, changes)} in one group of processes; returns each one's result."""
    told = [
        {"name": name, "packs": str(packs), "ds": ds, "changes": changes, "output": str(folder / name)}
        for name, (ds, changes) in scenarios.items()
    ]
    file = folder / "scenarios.json"
    file.write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(file)], world_size, folder / "log")
    return {name: load_file(folder / name / "result.safetensors") for name in scenarios}


def test_bf16_is_the_same_at_every_stage_and_near_fp32(packs, references, tmp_path):
    """Frozen weights and matrix products in bf16, trained weights in fp32; activation checkpointing on."""
    changes = {**ROUTER, "train__precision": "bf16"}
    found = run_scenarios(packs, {f"bf16-{number}": (stage(number), changes) for number in (2, 3)}, 2, tmp_path)
    exact, plain = references["router"], found["bf16-2"]
    assert relative_difference(plain["losses"], exact["losses"]) > 1e-5, "that was fp32"
    for name, result in found.items():
        assert relative_difference(result["losses"], exact["losses"]) < 1e-2, name
        assert torch.equal(result["losses"], plain["losses"]), name  # two ranks' gradients have one sum
        assert all(value.dtype == torch.float32 for key, value in result.items() if key.startswith("weight/"))


@pytest.mark.slow
def test_optimizer_offload_gives_the_plain_loops_losses_and_gradients(packs, references, tmp_path):
    """Slow, since DeepSpeed compiles its CPUAdam first, for minutes."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    scenarios = {
        f"{kind}-{number}": (stage(number, **offload), KINDS[kind])
        for kind in ("adapters", "full")
        for number in (1, 2, 3)
    }
    for name, found in run_scenarios(packs, scenarios, 2, tmp_path).items():
        assert_same(found, references[name.split("-")[0]], f"{name} with the optimizer offloaded")
