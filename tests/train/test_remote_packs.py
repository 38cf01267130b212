"""Training on packs at an address is, bit for bit, training on the same packs in a folder: two real ranks over one
cache that holds a part of them, from a real server of which reads fail and bytes are flipped."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.object_store import Faults, object_store
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, reblocked, write_packs

BLOCK, NUM_STEPS = 4096, 12
CACHE_GIB = 0.0001  # 26 blocks
CHANGES = {
    "train__packs_per_step": 10,
    "train__epochs": 1.0,
    "train__save_every_steps": 6,
    "train__keep_checkpoints": 5,
    "data__cache_gib": CACHE_GIB,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = write_packs(tmp_path_factory.mktemp("remote") / "packs", make_segments(10 * NUM_STEPS))
    reblocked(place, BLOCK)
    assert sum(path.stat().st_size for path in place.glob("*-0*.arrow")) > 3 * CACHE_GIB * 2**30
    return place


def train(place, *scenarios: tuple[str, str, bool], cache: str = "cache") -> None:
    """Trains each (packs, output, whether it goes on) one after another on two ranks."""
    file = place / "scenarios.json"
    changes = {**CHANGES, "data__cache": str(place / cache)}
    told = [
        {
            "name": output,
            "packs": packs,
            "output": str(place / output),
            "ds": {"zero_optimization": {"stage": 2}},
            "changes": changes,
            "resume": resume,
        }
        for packs, output, resume in scenarios
    ]
    file.write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(file)], 2, place / "log")


def assert_same(run, other) -> None:
    found, expected = (load_file(place / "result.safetensors") for place in (run, other))
    assert found.keys() >= {"losses", "grad_norms"} and len(expected["losses"]) == NUM_STEPS
    for name, value in expected.items():
        if not name.startswith("gradient/"):  # of a step that a run that goes on does not count alike
            assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    with object_store(folder.parent) as store:
        store.faults = Faults(fail=0.05, flip=0.02)
        train(place, (str(folder), "near", False), (f"{store.address}/packs", "far", False))
    assert store.failed.total() > 5 and store.flipped.total() > 2, "the test tests nothing"
    held = [path for path in (place / "cache" / "blocks").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in held) <= CACHE_GIB * 2**30
    return place


def test_losses_gradients_and_weights_are_those_of_the_folder_though_reads_fail_and_bytes_flip(trained):
    assert_same(trained / "far", trained / "near")
    gradients = [load_file(trained / name / "result.safetensors") for name in ("far", "near")]
    names = [name for name in gradients[1] if name.startswith("gradient/")]
    assert names and all(torch.equal(gradients[0][name], gradients[1][name]) for name in names)


@pytest.mark.slow
def test_a_run_goes_on_from_the_other_place(trained, folder):
    for name in ("near", "far"):
        copy = trained / f"{name}-on"
        shutil.copytree(trained / name, copy, symlinks=True)
        shutil.rmtree(copy / "checkpoints" / f"step-{NUM_STEPS:08d}")
        (copy / "result.safetensors").unlink()
    with object_store(folder.parent) as store:
        train(trained, (f"{store.address}/packs", "near-on", True), (str(folder), "far-on", True))
    for name in ("near-on", "far-on"):
        assert_same(trained / name, trained / "near")
