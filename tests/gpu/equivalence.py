"""Real DeepSpeed at ZeRO 0 to 3 in fp32 and bf16 beside a plain PyTorch loop that feeds one sample at a time, all on
this device.

The table says which stages give ZeRO 0's losses bit for bit; where the norm for clipping is summed in another order, or
ranks share the sums, they may differ in the last digits. LoRA's in bf16 do at ZeRO 3: DeepSpeed's hooks put a node in
front of each module, so that two gradients of a LoRA layer's input, by the frozen weight and by A, are added before
those of the other projections, and bf16 rounds each sum. Emulated, DeepSpeed asks for autocast as it does on CUDA.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file

from tests.gpu.part import Findings, run_items
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from tests.train.plain_loop import plain_run, relative_difference
from tests.train.zero.test_equivalence import stage

STEPS = 12
CHANGES = {
    "train__packs_per_step": 5,
    "train__max_steps": STEPS,
    "train__epochs": 10.0,
    "train__save_every_steps": 1000,
    "optim__warmup_epochs": 0.5,
}
KINDS = {
    "adapters": {},
    "full": {"model__tune": "full", "optim__clip": 0.5, "optim__lr": 1e-3},
    "router_recomputed": {"model__adapter__kind": "router", "train__activation_checkpointing": True},
    "lora": {"model__llm__peft__kind": "lora", "model__adapter__llm": "none"},
}
STAGES = {"adapters": range(4), "full": range(4), "router_recomputed": (0, 3), "lora": (0, 3)}
FP32_LIMIT, BF16_LIMIT = 1e-4, 2e-2
STAGES_LIMIT = 1e-4  # between stages
EMULATED = ("adapters",)


def find(findings: Findings, kind: str) -> None:
    packs = write_packs(findings.folder / "packs", make_segments(14))
    worlds = [1] if findings.emulate or torch.cuda.device_count() < 2 else [1, 2]
    scenarios = {}
    for precision in ("fp32", "bf16"):
        for number in STAGES[kind]:
            scenarios[f"{kind}|{precision}|{number}"] = (
                stage(number),
                {**CHANGES, **KINDS[kind], "train__precision": precision},
            )
    plain = plain_run(packs, {**CHANGES, **KINDS[kind]}, findings.device)
    for world_size in worlds:
        _compare(findings, kind, world_size, plain, _run(findings, packs, scenarios, world_size))


def _run(findings: Findings, packs, scenarios: dict, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = findings.folder / f"ranks-{world_size}"
    folder.mkdir(exist_ok=True)
    places = {name: folder / str(number) for number, name in enumerate(scenarios)}
    told = [
        {
            "name": name,
            "flag": findings.emulate,
            "packs": str(packs),
            "ds": ds,
            "changes": changes,
            "output": str(places[name]),
        }
        for name, (ds, changes) in scenarios.items()
    ]
    file = folder / "scenarios.json"
    file.write_text(json.dumps(told))
    module = "tests.train.zero.autocast_worker" if findings.emulate else "tests.train.worker"
    run_ranks(module, [str(file)], world_size, folder / "log", timeout_seconds=500)
    return {name: load_file(place / "result.safetensors") for name, place in places.items()}


def _compare(findings: Findings, kind: str, world_size: int, plain: dict, found: dict) -> None:
    for precision, limit in (("fp32", FP32_LIMIT), ("bf16", BF16_LIMIT)):
        first = found[f"{kind}|{precision}|0"]["losses"]
        for number in STAGES[kind]:
            losses = found[f"{kind}|{precision}|{number}"]["losses"]
            told = {
                "trained": kind,
                "precision": precision,
                "ranks": world_size,
                "stage": number,
                "last_loss": float(losses[-1]),
            }
            told |= {
                "as_zero_0": "bit for bit"
                if torch.equal(losses, first)
                else f"to {relative_difference(losses, first):.1e}"
            }
            findings.check(
                "losses beside the plain loop's in fp32", relative_difference(losses, plain["losses"]), limit, **told
            )
            findings.require(
                relative_difference(losses, first) <= STAGES_LIMIT,
                f"{kind} in {precision}: ZeRO {number} gives other losses than ZeRO 0",
            )


if __name__ == "__main__":
    chosen = EMULATED if "--emulate" in sys.argv else tuple(KINDS)
    sys.exit(run_items("equivalence", chosen, find, __doc__))
