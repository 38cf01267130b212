"""Each planted fault fails the check before the first step, in a line that names it; without one, nothing fails. Real
processes, on one rank and two."""

import json

import pytest

from tests.preflight.faults import BEFORE, FAULTS
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from tests.train.zero.test_equivalence import stage

CHANGES = {"train__packs_per_step": 4, "train__max_steps": 4, "train__epochs": 10.0}
# (what fails first, words of its line) of the full check.
NAMED = {
    "leaking_mask": ("isolation", "sees segment 2 of 3"),
    "positions_that_go_on": ("positions", "have to begin anew with each segment"),
    "loss_scaled_by_ranks": ("loss scale", "the gradient is 0.5 times"),
    "loss_of_own_labels": ("loss scale", "2 of it"),
    "rank_without_images": ("images by rank", "rank 1 reads no image where others do"),
    "pack_too_large": ("memory", "out of memory at a pack of"),
    "frozen_tower_that_moves": ("frozen parameters", "vision: 1 parameter(s) are frozen and changed"),
    "adapter_without_gradient": ("trained parameters", "get no gradient, the first llm.model.layers.0."),
    "adapter_that_text_does_not_reach": ("trained parameters", "get no gradient, the first "),
    "gradient_that_is_nan": ("gradients", "NaN or Inf"),
    "dropout_without_a_rate": ("repeatable", "trained with every dropout rate at 0, the same pack differs by"),
    "dropout_in_evaluation": ("repeatable", "evaluated, the same pack differs by"),
    "loss_by_pack": ("loss scale", "the gradient is "),
    "nan_in_a_weight_that_no_pack_reads": ("weights", "llm.model.embed_tokens.weight: holds NaN or Inf"),
    "infinite_optimizer": ("weights", "the optimizer's exp_avg_sq of "),
    "tower_that_is_trained": ("frozen parameters", "are trained, which the recipe freezes, the first vision."),
    "tied_by_mistake": ("trained parameters", "are one tensor: tied by mistake"),
    "rate_of_nothing": ("trained parameters", "neck: 4 parameter(s) have a gradient, and the optimizer leaves them"),
    "part_without_optimizer": ("trained parameters", "and the optimizer leaves them"),
}
AT_STAGE_0 = ("tied_by_mistake", "part_without_optimizer")  # elsewhere DeepSpeed itself stops at them
QUICK = ("leaking_mask", "positions_that_go_on", "pack_too_large", "adapter_without_gradient")
# What takes several ranks to be wrong, and what every rank has a part of.
OF_RANKS = ("loss_scaled_by_ranks", "rank_without_images", "adapter_that_text_does_not_reach")


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return write_packs(tmp_path_factory.mktemp("faults") / "packs", make_segments(14))


def found(packs, folder, world_size, faults, check="full", number=3):
    told = [
        {
            "name": fault,
            "packs": str(packs),
            "ds": stage(0 if fault in AT_STAGE_0 else number),
            "changes": CHANGES,
            "fault": fault,
            "check": check,
            "output": str(folder / f"fault-{fault}"),
        }
        for fault in faults
    ]
    (folder / "scenarios.json").write_text(json.dumps(told))
    run_ranks("tests.preflight.worker", [str(folder / "scenarios.json")], world_size, folder / "log", 1200)
    return {
        fault: json.loads((folder / f"fault-{fault}" / f"findings.{world_size - 1}.json").read_text())
        for fault in faults
    }


def failures(lines):
    return [(one["what"], one["found"]) for one in lines if one["status"] == "FAILED"]


def assert_named(everything):
    assert {one["status"] for one in everything.pop("")} == {"ok"}
    for fault, lines in everything.items():
        what, said = NAMED[fault]
        first = failures(lines)
        assert first and first[0][0] == what and said in first[0][1], (fault, first)


def test_every_fault_is_named(packs, tmp_path):
    assert NAMED.keys() == FAULTS.keys() | BEFORE.keys()
    assert_named(found(packs, tmp_path, 1, ["", *(fault for fault in NAMED if fault not in OF_RANKS)]))


def test_faults_of_several_ranks_are_named(packs, tmp_path):
    assert_named(found(packs, tmp_path, 2, ["", *OF_RANKS]))


@pytest.mark.slow
def test_every_fault_is_named_on_two_ranks(packs, tmp_path):
    assert_named(found(packs, tmp_path, 2, ["", *NAMED]))


@pytest.mark.slow
def test_the_quick_check_finds_most_of_them_on_one_rank(packs, tmp_path):
    everything = found(packs, tmp_path, 1, ["", *QUICK], check="quick", number=2)
    assert {one["status"] for one in everything.pop("")} == {"ok"}
    for fault, lines in everything.items():
        assert failures(lines)[0][0] == NAMED[fault][0], fault
