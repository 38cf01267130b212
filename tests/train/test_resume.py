"""A run that is killed and resumed ends as one that was not: bit for bit at the same ranks, to 1e-5 at others. Real
processes."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks, start_ranks, stop_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.receipts.verify import prove

CHANGES = {
    "train__packs_per_step": 3,
    "train__max_steps": 14,
    "train__epochs": 10.0,
    "train__save_every_steps": 3,
    "model__adapter__dropout": 0.1,
    "model__tune": "full",
    "model__vision__peft__kind": "pissa",
    "optim__lr": 1e-3,
    "data__workers": 1,
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return write_packs(tmp_path_factory.mktemp("resume") / "packs", make_segments(14))


def scenario(packs: Path, output: Path, stage: int, *, resume: bool, **changes) -> str:
    zero = {
        "stage": stage,
        "reduce_bucket_size": 500,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }
    file = output.parent / f"{output.name}-{stage}-{resume}.json"
    one = {
        "name": output.name,
        "packs": str(packs),
        "output": str(output),
        "ds": {"zero_optimization": zero},
        "changes": {**CHANGES, **changes},
        "resume": resume,
    }
    file.write_text(json.dumps([one]))
    return str(file)


def kill_when_logged(processes, log: Path, num_lines: int, delay: float) -> None:
    """kill -9 to every rank, soon after the log has so many lines."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if log.exists() and log.read_text().count("\n") >= num_lines:
            break
        time.sleep(0.01)
    time.sleep(delay)
    stop_ranks(processes, signal.SIGKILL)


@pytest.mark.parametrize(("stage", "kills"), [(2, (2, 9)), pytest.param(3, (7,), marks=pytest.mark.slow)])
def test_kill_9_and_resume_is_bit_identical(packs, tmp_path, stage, kills):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks("tests.train.worker", [scenario(packs, whole, stage, resume=False)], 2, tmp_path / "log-whole")
    arguments = [scenario(packs, broken, stage, resume=True)]
    generator = random.Random(stage)
    for number, kill in enumerate(kills):
        processes = start_ranks("tests.train.worker", arguments, 2, tmp_path / f"log-{number}")
        kill_when_logged(processes, broken / "log.jsonl", kill, delay=generator.uniform(0, 0.3))
        assert not (broken / "result.safetensors").exists(), "it had ended before it was killed"
    run_ranks("tests.train.worker", arguments, 2, tmp_path / "log-last")
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert (broken / "receipt.jsonl").read_bytes() == (whole / "receipt.jsonl").read_bytes()
    assert (broken / "history.bin").read_bytes() == (whole / "history.bin").read_bytes()
    proof = prove(broken, None, whole)
    assert proof.failures == [] and any("losses equal bit for bit" in fact for fact in proof.facts)
    expected, found = load_file(whole / "result.safetensors"), load_file(broken / "result.safetensors")
    differing = [
        name for name in expected if not name.startswith("gradient/") and not torch.equal(expected[name], found[name])
    ]
    assert differing == []


def test_ranks_and_stages_may_change_on_the_way(packs, tmp_path):
    """ZeRO 2 on two ranks, then ZeRO 3 on one, then plain data parallelism on two: the losses are those of one
    undisturbed run."""
    # Dropout draws per rank, so it is the one thing that another number of ranks changes.
    steps = {"model__adapter__dropout": 0.0, "data__workers": 0}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_ranks("tests.train.worker", [scenario(packs, whole, 1, resume=False, **steps)], 1, tmp_path / "log-whole")
    for stage, world_size, until in ((2, 2, 4), (3, 1, 8)):
        processes = start_ranks(
            "tests.train.worker",
            [scenario(packs, moved, stage, resume=True, **steps)],
            world_size,
            tmp_path / f"log-{stage}",
        )
        kill_when_logged(processes, moved / "log.jsonl", until, delay=0.0)
    run_ranks("tests.train.worker", [scenario(packs, moved, 0, resume=True, **steps)], 2, tmp_path / "log-last")
    expected, found = load_file(whole / "result.safetensors"), load_file(moved / "result.safetensors")
    assert torch.allclose(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    assert len(found["losses"]) == CHANGES["train__max_steps"]
    assert prove(moved, None, whole, tolerance=1e-5).failures == []
