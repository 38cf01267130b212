"""Training around quantised weights under real DeepSpeed processes: the same at every stage that takes them and on any
number of ranks."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs

pytest.importorskip("bitsandbytes", reason="install the extra `quant`")
CHANGES = {
    "train__packs_per_step": 4,
    "train__epochs": 10.0,
    "train__max_steps": 6,
    "train__save_every_steps": 3,
    "train__keep_checkpoints": 9,
}
ADAPTERS, LORA = (
    {},
    {"model__llm__peft__kind": "lora", "model__adapter__llm": "none", "train__activation_checkpointing": True},
)


def run(scenarios, world_size, log):
    file = log.with_suffix(".json")
    file.write_text(json.dumps(scenarios))
    run_ranks("tests.train.worker", [str(file)], world_size, log)
    return [load_file(f"{one['output']}/result.safetensors") for one in scenarios]


@pytest.mark.parametrize("stages", [(2,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_losses_gradients_and_weights_do_not_depend_on_stage_and_ranks(tmp_path, stages):
    """ZeRO 0 on one rank against 0, 1 and 2 on two, in 4 and 8 bits."""
    scenario = partial(dict, packs=str(write_packs(tmp_path / "packs", make_segments(8))))
    cases = {
        (kind, bits): {**CHANGES, **changes, "model__bits": bits}
        for kind, changes in (("adapters", ADAPTERS), ("lora", LORA))
        for bits in (4, 8)
    }

    def of_stage(stage, ranks):
        return [
            scenario(
                name=f"{kind}-{bits}",
                ds={"zero_optimization": {"stage": stage}},
                changes=changes,
                output=str(tmp_path / f"{kind}-{bits}-{stage}-{ranks}"),
            )
            for (kind, bits), changes in cases.items()
        ]

    alone = run(of_stage(0, 1), 1, tmp_path / "log-1")
    spread = run([one for stage in stages for one in of_stage(stage, 2)], 2, tmp_path / "log-2")
    for number, found in enumerate(spread):
        expected = alone[number % len(cases)]
        assert len(expected["losses"]) == CHANGES["train__max_steps"] and expected["losses"][-1] < expected["losses"][0]
        assert not any("base_layer" in name or name.endswith("_proj.weight") for name in found), (
            "frozen weights have no state"
        )
        for name in ("losses", "grad_norms", *(name for name in expected if name.startswith("gradient/"))):
            difference = (found[name].double() - expected[name].double()).abs().max() / expected[
                name
            ].double().abs().max()
            assert difference < 2e-5, (number, name, difference)


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    packs = str(write_packs(tmp_path / "packs", make_segments(8)))
    whole = dict(
        name="whole",
        packs=packs,
        ds={"zero_optimization": {"stage": 2}},
        changes={**CHANGES, "model__bits": 4},
        output=str(tmp_path / "run"),
    )
    (expected,) = run([whole], 2, tmp_path / "log-whole")
    for step in (tmp_path / "run" / "checkpoints").glob("step-*6"):
        for file in step.iterdir():
            file.unlink()  # what is left is the checkpoint of step 3
        step.rmdir()
    (found,) = run([{**whole, "resume": True}], 2, tmp_path / "log-resumed")
    weights = [name for name in expected if name.startswith("weight/")]
    assert weights and all(torch.equal(found[name], expected[name]) for name in weights)
