"""Digests of the frozen weights: a sum over bits that no single change leaves alone, the same at every ZeRO stage and
number of ranks, in the receipt at the start and at every checkpoint."""

import json
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.programs.check import main
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.receipts.verify import prove
from vltrain.train.zero import bit_digest as module
from vltrain.train.zero.bit_digest import COLUMNS, bit_digest
from vltrain.train.zero.frozen import FrozenWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float64)
NUM_STEPS = 6


def splitmix(number: int) -> int:
    """The `number`-th of splitmix64's numbers, made odd; of Python's whole numbers."""
    state = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31) | 1


def plain_digest(tensor: torch.Tensor, first: int = 0) -> int:
    bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    total = 0
    for place, value in enumerate(bits.tolist(), start=first):
        row, column = divmod(place, COLUMNS)
        total += value * splitmix((1 << 48) + column) * splitmix(row)
    return (total + 2**63) % 2**64 - 2**63


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    raw = np.random.default_rng(count).integers(0, 256, count * torch.empty(0, dtype=dtype).element_size())
    return torch.frombuffer(bytearray(raw.astype(np.uint8)), dtype=dtype) if count else torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_sum_of_each_numbers_bits_times_its_places(dtype):
    tensor = numbers(3 * COLUMNS + 17, dtype)
    assert bit_digest(tensor).item() == plain_digest(tensor)
    assert bit_digest(tensor[5:], 5).item() == plain_digest(tensor[5:], 5)


@pytest.mark.parametrize("count", [0, 1, COLUMNS - 1, COLUMNS, 40 * COLUMNS + 3])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_parts_add_up(count, num_parts, monkeypatch):
    tensor = numbers(count, torch.bfloat16)
    whole = bit_digest(tensor).item()
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 3)  # chunks are no part of it
    assert bit_digest(tensor).item() == whole
    length = -(-count // num_parts)
    parts = [bit_digest(tensor[rank * length :][:length], rank * length) for rank in range(num_parts)]
    assert torch.stack(parts).sum().item() == whole


def test_any_bit_and_any_two_numbers_that_change_places_change_it():
    tensor = numbers(2 * COLUMNS, torch.float32)
    whole, generator = bit_digest(tensor).item(), random.Random(0)
    bits = tensor.view(torch.int32)
    for _ in range(200):
        place, bit = generator.randrange(len(bits)), generator.randrange(32)
        changed = bits.clone()
        changed[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
        assert bit_digest(changed).item() != whole
        one, two = generator.sample(range(len(bits)), 2)
        changed = bits.clone()
        changed[[one, two]] = changed[[two, one]]
        assert bit_digest(changed).item() != whole
    assert bit_digest(-tensor).item() != whole  # every top bit at once


class Parts(torch.nn.Module):
    """A model with packed weights and their scales, a cast tower, a constant that is no weight, and a trained neck."""

    def __init__(self):
        super().__init__()
        self.vision, self.llm, self.neck = (torch.nn.Linear(8, 8) for _ in range(3))
        self.vision.to(torch.bfloat16)
        self.llm.weight = torch.nn.Parameter(torch.arange(64).to(torch.int8), requires_grad=False)
        self.llm.register_buffer("scale", torch.rand(8))
        self.vision.register_buffer("mean", torch.zeros(3), persistent=False)
        for network in (self.vision, self.llm):
            network.requires_grad_(False)

    @staticmethod
    def part_of(name: str) -> str:
        return name.partition(".")[0]


def test_quantised_weights_and_their_scales_count_and_constants_do_not(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = Parts()
        frozen = FrozenWeights(model, torch.device("cpu"))
        start = frozen.digests()
        assert set(start) == {"vision/bfloat16", "llm/int8", "llm/float32"}
        for tensor, key in (
            (model.vision.weight, "vision/bfloat16"),
            (model.llm.weight, "llm/int8"),
            (model.llm.scale, "llm/float32"),
            (model.vision.mean, None),
            (model.neck.weight, None),
        ):
            kept = tensor.detach().clone()
            tensor.data.view(-1)[1] += 1
            found = frozen.digests()
            assert [name for name in start if found[name] != start[name]] == ([key] if key else [])
            tensor.data.copy_(kept)
        assert frozen.digests() == start
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on one rank and on two under ZeRO-3, and two in which one frozen number moves on the last rank: in
    its own copy under plain data parallelism, in its part under ZeRO-3."""
    folder = tmp_path_factory.mktemp("frozen")
    packs = write_packs(folder / "packs", make_segments(7))
    changes = {"train__packs_per_step": 3, "train__max_steps": NUM_STEPS, "train__save_every_steps": 2}
    changes |= {"train__epochs": 3.0, "train__keep_checkpoints": 9}

    def scenario(name, stage, **more):
        threshold = {"stage3_param_persistence_threshold": 100} if stage == 3 else {}
        zero = {"stage": stage, "reduce_bucket_size": 500, **threshold}
        one = {"name": name, "packs": str(packs), "output": str(folder / name), "changes": changes, "resume": True}
        return {**one, "ds": {"zero_optimization": zero}, **more}

    tower, llm = "vision.clip.encoder.layers.1.mlp.fc1.weight", "llm.model.layers.1.mlp.up_proj.weight"
    both = [
        scenario("zero3", 3),
        scenario("moved3", 3, moves={"step": 3, "name": llm}),
        scenario("left", 0, leaves_at=3, moves={"step": 4, "name": tower}),
        scenario("killed", 2, dies_at=3),
        scenario("killed", 2),
    ]
    for world_size, scenarios in ((1, [scenario("plain", 0)]), (2, both)):
        file = folder / f"{world_size}.json"
        file.write_text(json.dumps(scenarios))
        run_ranks("tests.train.fault_worker", [str(file)], world_size, folder / "log")
    return folder


def test_stages_and_ranks_do_not_change_the_digests(runs):
    plain, zero3, killed = (read_receipt(runs / name / RECEIPT) for name in ("plain", "zero3", "killed"))
    assert plain.header.frozen == zero3.header.frozen == killed.header.frozen
    assert set(plain.header.frozen) == {"vision/float32", "llm/float32"}
    for receipt in (plain, zero3, killed):
        found = {line.step: line.frozen for line in receipt.lines if line.frozen is not None}
        assert found == dict.fromkeys((1, 3, 5), plain.header.frozen)
    proof = prove(runs / "zero3", None, runs / "plain", tolerance=1e-4)
    assert proof.failures == []
    assert "frozen weights: llm, vision as at the start at each of 3 checkpoint(s)" in proof.facts


def test_one_number_that_moves_is_found_with_its_part_and_checkpoint(runs, capsys):
    for name, told in (
        ("moved3", "frozen weights: llm (float32) moved between step 2 and the checkpoint of step 4"),
        ("left", "frozen weights: vision (float32) moved between step 4 and the checkpoint of step 5"),
    ):
        assert main(["resume", str(runs / name)]) == 1
        failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
        assert failures == [f"FAILED  {told}"]
    log = (runs / "log.0").read_text()
    assert "frozen weights have moved since the start: llm.model.layers.1.mlp.up_proj.weight" in log
