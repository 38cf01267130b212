"""Off logging steps no training step makes the host wait for the device; DeepSpeed's own waits are the ones that
`vltrain.train.zero.engine` names."""

import json

import pytest
import torch

from tests.support.blip import blip_config, make_samples
from tests.support.kinds import tokenizer_of
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from tests.train.zero.reads_worker import NUM_WATCHED, Reads
from vltrain.data.text.conversation import encode_sample

CHANGES = {
    "train__packs_per_step": 2,
    "train__max_steps": NUM_WATCHED + 2,
    "train__epochs": 10.0,
    "train__save_every_steps": 1000,
    "train__log_every_steps": 1000,
    "train__hang_timeout_minutes": None,
}
MMT = {
    "adapters": {},
    "router": {"model__adapter__kind": "router"},
    "full": {"model__tune": "full"},
    "lora": {"model__llm__peft__kind": "lora"},
}


def blip_packs(folder, kind: str):
    tokenizer, config = tokenizer_of(kind), blip_config(kind)
    segments = [encode_sample(sample, tokenizer, config.data.template, 4) for sample in make_samples(12)]
    return write_packs(folder, [segments[start : start + 3] for start in range(0, 12, 3)])


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_step_reads_the_device(tmp_path, world_size):
    packs = write_packs(tmp_path / "packs", make_segments(8))
    told = []
    for stage in (0, 2, 3):
        ds = {"zero_optimization": {"stage": stage}}
        for name, changes in MMT.items() if stage == 0 else [("adapters", {})]:
            output = str(tmp_path / f"{name}-{stage}")
            told.append(
                {"name": name, "packs": str(packs), "ds": ds, "output": output, "changes": {**CHANGES, **changes}}
            )
    for kind in ("llama", "t5"):
        packs = blip_packs(tmp_path / f"packs-{kind}", kind)
        told.append(
            {
                "name": kind,
                "packs": str(packs),
                "ds": {"zero_optimization": {"stage": 0}},
                "output": str(tmp_path / f"{kind}-0"),
                "changes": CHANGES,
                "blip": kind,
            }
        )
    (tmp_path / "scenarios.json").write_text(json.dumps(told))
    run_ranks("tests.train.zero.reads_worker", [str(tmp_path / "scenarios.json")], world_size, tmp_path / "log")
    for scenario in told:
        for rank in range(world_size):
            found = json.loads(open(f"{scenario['output']}/reads.{rank}.json").read())
            assert len(found) == NUM_WATCHED
            reads = [read for steps in found.values() for read in steps]
            theirs = ("/deepspeed/",) if scenario["ds"]["zero_optimization"]["stage"] else ()
            # transformers asks, once a mask, whether any text of a Q-Former or a T5 is padded: then it leaves the mask
            # out.
            theirs += ("transformers/masking_utils.py",) if "blip" in scenario else ()
            ours = [read for read in reads if not any(part in read for part in theirs)]
            assert not ours, f"{scenario['output']}: {ours}"


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: bool((x > 0).all()),
    ],
)
def test_the_stand_in_sees_reads(read):
    x = torch.ones(3)
    with Reads() as reads:
        read(torch.ones(3))
        assert not reads.found, "that one is on the host"
        reads.mark(x)
        read(x + 1)
    assert reads.found
