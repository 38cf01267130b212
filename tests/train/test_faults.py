"""Out of memory, slow and hanging ranks are told in words. The last two on real processes."""

import json

import pytest
import torch

from tests.support.processes import start_ranks, wait_for_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.data.loader import filler
from vltrain.data.pictures import SquareReader
from vltrain.distributed.stragglers import straggler
from vltrain.errors import InputError
from vltrain.memory.out_of_memory import oom_context


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_names_the_pack_and_advises(error):
    with pytest.raises(InputError) as caught, oom_context(filler(True, SquareReader(size=8)), step=17, rank=3):
        raise error
    assert str(caught.value).startswith(
        "step 17, rank 3: out of memory at a pack of 2 tokens and 1 images (samples filler)"
    )
    assert "data.pack_length" in str(caught.value) and "\n" not in str(caught.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), oom_context(filler(False, SquareReader(size=8)), step=1, rank=0):
        raise RuntimeError("shapes do not fit")


def test_who_is_a_straggler():
    assert straggler([(0.1, 1.0), (0.1, 1.1), (0.1, 1.2)]) is None
    assert straggler([(0.0, 0.001), (0.0, 0.009)]) is None  # too little to matter
    assert straggler([(0.1, 1.0), (2.1, 1.0), (0.1, 1.0)]).startswith(
        "rank 1 makes the others wait: 3.10 s a step, the median rank 1.10 s; fetching 2.10 s"
    )


def test_a_slow_rank_is_named_and_a_hanging_one_ends_the_run(tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(8))
    changes = {
        "train__packs_per_step": 4,
        "train__max_steps": 6,
        "train__epochs": 9.0,
        "train__log_every_steps": 3,
        "train__hang_timeout_minutes": 0.1,
    }
    told = {"packs": str(packs), "ds": {"zero_optimization": {"stage": 2}}, "changes": changes}
    scenarios = [
        {**told, "name": "slow", "output": str(tmp_path / "slow"), "slow": [1, 0.3]},
        {**told, "name": "hangs", "output": str(tmp_path / "hangs"), "hangs_at": [1, 3]},
    ]
    (tmp_path / "scenarios.json").write_text(json.dumps(scenarios))
    processes = start_ranks("tests.train.fault_worker", [str(tmp_path / "scenarios.json")], 2, tmp_path / "log")
    codes = wait_for_ranks(processes, tmp_path / "log", timeout_seconds=120)
    said = (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert "rank 1 makes the others wait" in said and "rank 0 makes the others wait" not in said
    assert 1 in codes and "the others wait for rank 1, which hangs at step 3 (forward)" in said, said[-3000:]
    assert (tmp_path / "slow" / "result.safetensors").exists() and not (
        tmp_path / "hangs" / "result.safetensors"
    ).exists()
