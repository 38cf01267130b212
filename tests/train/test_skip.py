"""train.on_bad_loss = skip: the update of a bad step leaves no trace, on any stage, and a resumed run decides alike.
Real engines on two ranks."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.receipts.history import read_history
from vltrain.receipts.receipt import read_receipt
from vltrain.receipts.verify import prove
from vltrain.train.checkpoints.checkpoint import newest_checkpoint, open_checkpoint

NUM_STEPS, NAN, SPIKE, INFINITE = 17, 4, 12, 15


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed runs of ZeRO 2 and 3; one that dies after both kinds of skips and goes on; one that only ever has
    bad losses."""
    folder = tmp_path_factory.mktemp("skip")
    write_packs(folder / "packs", make_segments(14))
    scenarios = []
    for name, stage, more in (
        ("zero2", 2, {}),
        ("zero3", 3, {}),
        ("broken", 2, {"dies_at": 6}),
        ("broken", 2, {"dies_at": 14}),
        ("broken", 2, {}),
        ("hopeless", 2, {"poison": {str(step): "nan" for step in range(2, 20)}, "may_fail": True}),
    ):
        changes = {
            "train__packs_per_step": 3,
            "train__max_steps": NUM_STEPS,
            "train__epochs": 20.0,
            "train__save_every_steps": 1,
            "optim__lr": 1e-3,
            "train__keep_checkpoints": 30,
            "train__on_bad_loss": "skip",
            "train__spike_factor": 4.0,
            "model__tune": "full",
        }
        zero = {
            "stage": stage,
            "reduce_bucket_size": 500,
            **({"stage3_param_persistence_threshold": 100} if stage == 3 else {}),
        }
        one = {
            "name": name,
            "packs": str(folder / "packs"),
            "output": str(folder / name),
            "ds": {"zero_optimization": zero},
            "resume": True,
        }
        scenarios.append(
            {**one, "changes": changes, "poison": {str(NAN): "nan", str(SPIKE): 50, str(INFINITE): "inf"}, **more}
        )
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    run_ranks("tests.train.fault_worker", [str(folder / "scenarios.json")], 2, folder / "log")
    return folder


def whole_state(path):
    found = open_checkpoint(path)
    return {
        **dict(found.weights()),
        **{
            f"{kind}/{name}": value for name, kinds in found.optimizer_states().items() for kind, value in kinds.items()
        },
    }


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_skipped_step_changes_neither_weights_nor_averages(runs, name):
    states = [whole_state(runs / name / "checkpoints" / f"step-{step:08d}") for step in range(1, NUM_STEPS + 1)]
    same = [
        step + 1
        for step, (one, two) in enumerate(zip(states, states[1:]))
        if all(torch.equal(one[key], two[key]) for key in one)
    ]
    assert same == [NAN, SPIKE, INFINITE]
    assert newest_checkpoint(runs / name / "checkpoints").run_state["guard"]["num_skipped"] == 3


def test_every_stage_goes_on_alike(runs):
    found, expected = (load_file(runs / name / "result.safetensors")["losses"] for name in ("zero3", "zero2"))
    assert torch.allclose(found, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_a_resumed_run_is_bit_identical(runs):
    found, expected = (
        load_file(runs / "broken" / "result.safetensors"),
        load_file(runs / "zero2" / "result.safetensors"),
    )
    assert [
        key for key in expected if key.startswith(("weight/", "exp_")) and not torch.equal(found[key], expected[key])
    ] == []
    for name in ("receipt.jsonl", "log.jsonl", "quarantine.jsonl"):
        assert (runs / "broken" / name).read_text().replace("broken", "zero2") == (runs / "zero2" / name).read_text()
    assert (runs / "broken" / "history.bin").read_bytes() == (runs / "zero2" / "history.bin").read_bytes()


def test_the_receipt_and_the_quarantine_name_the_steps(runs):
    assert [line.step for line in read_receipt(runs / "zero3" / "receipt.jsonl").lines if line.skipped] == [
        NAN,
        SPIKE,
        INFINITE,
    ]
    proof = prove(runs / "zero3", None, runs / "zero2", tolerance=1e-4)
    assert proof.failures == [] and any(
        fact.startswith("skipped: the update of step(s) 4, 12, 15") for fact in proof.facts
    )
    history = read_history(runs / "zero3")  # of skipped steps, too
    assert [step for step in range(NUM_STEPS) if np.isnan(history.losses(step)).any()] == [NAN]
    assert np.isinf(history.losses(INFINITE)).any()
    lines = [json.loads(line) for line in (runs / "zero3" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [NAN, SPIKE, INFINITE]
    assert all(sample["loss"] == "nan" for sample in lines[0]["samples"]) and "times the mean" in lines[1]["reason"]
    assert all(sample["id"].startswith("p") for line in lines for sample in line["samples"])
    assert lines[0]["replay"].endswith("--step 4")


def test_a_run_that_only_ever_skips_ends(runs):
    for rank in (0, 1):
        told = (runs / f"hopeless.error.{rank}").read_text()
        assert told.startswith("step 12: loss nan") and "11 in a row were skipped" in told
