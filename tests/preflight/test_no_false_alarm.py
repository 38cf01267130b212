"""The full check finds nothing wrong with anything that trains here: every kind of adapter, LoRA and AdaLoRA, prompts,
full tuning, checkpointing, bf16, InstructBLIPs with LLaMA and T5. Real processes."""

import json

import pytest

from tests.golden.runs import scenarios
from tests.support.processes import run_ranks

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
