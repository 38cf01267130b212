"""The full check finds nothing wrong with anything that trains here: every kind of adapter, LoRA and AdaLoRA, prompts,
full tuning, checkpointing, bf16, InstructBLIPs with LLaMA and T5. Real processes."""

import json

import pytest

from tests.golden.runs import scenarios
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs

QUICK = ("mmt, router", "mmt, lora", "instructblip with t5, adalora", "instructblip with llama, lora")


def findings(told, folder, world_size=1):
    (folder / "told.json").write_text(json.dumps(told))
    run_ranks("tests.preflight.worker", [str(folder / "told.json")], world_size, folder / "log")
    return {one["name"]: json.loads(open(f"{one['output']}/findings.0.json").read()) for one in told}


def alarms(found):
    lines = {name: [one for one in lines if one["status"] != "ok"] for name, lines in found.items()}
    return {name: one for name, one in lines.items() if one}


def of_golden_runs(folder, names=None, **changes):
    return [
        {**one, "fault": "", "check": "full", "changes": {**one["changes"], **changes}}
        for one in scenarios(folder)
        if names is None or one["name"] in names
    ]


def test_of_some_golden_runs(tmp_path):
    told = of_golden_runs(tmp_path, QUICK)
    assert len(told) == len(QUICK)
    found = findings(told, tmp_path)
    assert alarms(found) == {} and all(len(lines) >= 11 for lines in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_all_golden_runs(tmp_path, precision):
    assert alarms(findings(of_golden_runs(tmp_path, train__precision=precision), tmp_path)) == {}


WAYS: dict[str, dict] = {
    "4 bits": {"model__bits": 4},
    "8 bits": {"model__bits": 8},
    "4 bits, lora, checkpointing": {
        "model__bits": 4,
        "model__llm__peft__kind": "lora",
        "model__adapter__llm": "none",
        "train__activation_checkpointing": True,
    },
    "8 bits, bf16": {"model__bits": 8, "train__precision": "bf16"},
    "16 bits": {"model__bits": 16, "train__precision": "bf16"},
    "kept features": {"train__keep_image_features": True, "model__adapter__vision": "none"},
    "checkpointing": {"train__activation_checkpointing": True},
    "full": {"model__tune": "full"},
    "dropout": {"model__adapter__dropout": 0.2},
    "offload": {},
}


SOME_WAYS = ("4 bits, lora, checkpointing", "8 bits, bf16", "kept features")


@pytest.mark.parametrize(
    "check, ways",
    [
        pytest.param("full", SOME_WAYS, id="full"),
        pytest.param("full", tuple(WAYS), marks=pytest.mark.slow, id="full-all"),
        pytest.param("quick", tuple(WAYS), marks=pytest.mark.slow, id="quick-all"),
    ],
)
def test_of_ways_to_run(tmp_path, check, ways):
    """Quantised and half-precision weights, kept image features, recomputed blocks, offload (for which DeepSpeed
    compiles its CPUAdam), of the tiny model."""
    packs = str(write_packs(tmp_path / "packs", make_segments(8)))
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    told = [
        {
            "name": name,
            "packs": packs,
            "output": str(tmp_path / name.replace(", ", "-").replace(" ", "-")),
            "ds": {"zero_optimization": offload if name == "offload" else {"stage": 0}},
            "changes": {"train__packs_per_step": 2, "train__epochs": 2.0, **WAYS[name]},
            "fault": "",
            "check": check,
        }
        for name in ways
    ]
    assert alarms(findings(told, tmp_path)) == {}
