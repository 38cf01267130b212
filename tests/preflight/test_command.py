"""`vltrain check recipe` on two ranks with a fault on board: which line names it, and how all ranks end."""

import json
import time

import pytest

from tests.preflight.small_recipes import recipe_named, small_recipes
from tests.support.processes import run_ranks, start_ranks, stop_ranks

FAULTS = {
    "": None,
    "tower_that_is_trained": "FAILED  frozen parameters: vision: ",
    "images_in_another_order": "the model is given other images than the pack's, or in another order",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    [file] = small_recipes(folder / "small", "fp32", [recipe_named("quickstart")]).values()
    return file


def write(folder, recipe, faults):
    told = [
        {"recipe": str(recipe), "words": ["--ds", "zero2"], "fault": fault, "result": str(folder / f"result-{fault}")}
        for fault in faults
    ]
    (folder / "told.json").write_text(json.dumps(told))
    return [str(folder / "told.json")]


@pytest.mark.slow
def test_faults_on_two_ranks(tmp_path, recipe):
    run_ranks("tests.preflight.command_worker", write(tmp_path, recipe, FAULTS), 2, tmp_path / "log", 150)
    for fault, said in FAULTS.items():
        first, second = (json.loads((tmp_path / f"result-{fault}.{rank}").read_text()) for rank in range(2))
        assert first["code"] == second["code"] == (1 if said else 0), first
        assert second["lines"] == []
        failed = [line for line in first["lines"] if line.startswith("FAILED")]
        assert bool(failed) == bool(said) and (not said or said in failed[0]), (fault, failed)


def test_memory_that_runs_out_on_one_rank_ends_all(tmp_path, recipe):
    """Nobody ends them: the rank that has none says which pack and what would fit, the other that it lost that one."""
    words = write(tmp_path, recipe, ["pack_too_large_on_one_rank"])
    ranks, began = start_ranks("tests.preflight.command_worker", words, 2, tmp_path / "log"), time.monotonic()
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() - began < 120:
            time.sleep(0.1)
        assert [rank.poll() is not None for rank in ranks] == [True, True]
    finally:
        stop_ranks(ranks)
    other, own = (json.loads((tmp_path / f"result-pack_too_large_on_one_rank.{rank}").read_text()) for rank in range(2))
    assert own["code"] == 1 and own["lines"][0].startswith("FAILED  memory: step 0, rank 1: out of memory at a pack of")
    assert any(line.startswith("WARNING to make it fit: ") for line in own["lines"])
    assert other["code"] == 2 and len(other["lines"]) == 1 and "rank" in other["lines"][0], other
