"""A run with the check before its first step has the losses, weights and optimizer states of one without it, bit for
bit: at every ZeRO stage, on one rank and two, going on from a checkpoint, with dropout and AdaLoRA. Real processes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.runs import ADALORA
from tests.support.blip import QUERIES, blip_config, make_samples, make_tokenizers
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from tests.train.zero.test_equivalence import stage
from vltrain.data.text.conversation import encode_sample
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer

CHANGES = {
    "train__packs_per_step": 3,
    "train__max_steps": 4,
    "train__epochs": 10.0,
    "train__save_every_steps": 2,
    "model__adapter__dropout": 0.1,
    "optim__clip": 0.5,
}
UPDATES = {
    "train__packs_per_step": 2,
    "train__max_steps": 6,
    "train__epochs": 10.0,
    "qformer__mode": "adalora",
    "llm__mode": "adalora",
    **{f"adalora__{name}": value for name, value in {**ADALORA, "tinit": 1}.items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("put_back")
    write_packs(folder / "packs", make_segments(14))
    places = make_tokenizers(folder / "tokenizers")
    tokenizer = load_tokenizer(places["llama"], InstructionSource(source=places["bert"], max_tokens=32))
    template = blip_config("llama").data.template
    segments = [encode_sample(sample, tokenizer, template, QUERIES) for sample in make_samples(8)]
    write_packs(folder / "blip", [segments[first : first + 2] for first in range(0, 8, 2)])
    return folder


def scenario(folder, output, number, check, **more):
    return {
        "name": output.name,
        "packs": str(folder / "packs"),
        "ds": stage(number),
        "changes": CHANGES,
        "output": str(output),
        "check": check,
        **more,
    }


def run(scenarios, world_size, place):
    place.mkdir()
    (place / "scenarios.json").write_text(json.dumps(scenarios))
    run_ranks("tests.preflight.worker", [str(place / "scenarios.json")], world_size, place / "log")


def assert_same(found, expected):
    results = [load_file(one / "result.safetensors") for one in (found, expected)]
    assert results[0].keys() == results[1].keys() and len(results[1]["losses"]) > 1
    assert [name for name in results[1] if not torch.equal(results[0][name], results[1][name])] == []
    for name in ("log.jsonl", "receipt.jsonl"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def assert_passed(output, world_size):
    found = [json.loads((output / f"findings.{rank}.json").read_text()) for rank in range(world_size)]
    assert all(one == found[0] for one in found) and len(found[0]) >= 6
    assert {one["status"] for one in found[0]} == {"ok"}, found[0]


SOME, EVERY = {2: "quick", 3: "full"}, {0: "full", 1: "quick", 2: "full", 3: "full"}


@pytest.mark.parametrize(
    ("world_size", "checks", "resumed"),
    [
        pytest.param(1, EVERY, (0, 2, 3), marks=pytest.mark.slow),
        pytest.param(2, EVERY, (0, 2, 3), marks=pytest.mark.slow),
        pytest.param(2, SOME, (3,), id="2-some"),
    ],
)
def test_a_run_with_the_check_is_the_run_without_it(folder, tmp_path, world_size, checks, resumed):
    told = [
        scenario(folder, tmp_path / f"{check or 'none'}-{number}", number, check)
        for number, kind in checks.items()
        for check in ("", kind)
    ]
    run(told, world_size, tmp_path / "first")
    for number, check in checks.items():
        assert_same(tmp_path / f"{check}-{number}", tmp_path / f"none-{number}")
        assert_passed(tmp_path / f"{check}-{number}", world_size)
    again = []
    for number in resumed:  # from the checkpoint in the middle
        name = f"again-{number}"
        shutil.copytree(tmp_path / f"none-{number}", tmp_path / name)
        newest = sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1]
        shutil.rmtree(newest)
        again.append(scenario(folder, tmp_path / name, number, "full", resume=True))
    run(again, world_size, tmp_path / "second")
    for number in resumed:
        assert_same(tmp_path / f"again-{number}", tmp_path / f"none-{number}")
        assert_passed(tmp_path / f"again-{number}", world_size)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_adaloras_averages_are_put_back(folder, tmp_path, world_size):
    adalora = {"packs": str(folder / "blip"), "blip": "llama", "changes": UPDATES}
    run([scenario(folder, tmp_path / name, 2, check, **adalora) for name, check in (("none", ""), ("full", "full"))],
        world_size, tmp_path / "first")  # fmt: skip
    assert_same(tmp_path / "full", tmp_path / "none")
    assert_passed(tmp_path / "full", world_size)
