"""Training on a mixture: a plain loop's losses, however it is spread and wherever it is killed, over a set's end. Real
DeepSpeed."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.mixtures.sets import make_mixture, make_sets
from tests.support.processes import run_ranks
from tests.train.plain_loop import plain_run
from vltrain.data.stream.mixed import mixed, open_packed
from vltrain.receipts.history import read_history
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.receipts.verify import plan_of, prove

CHANGES = {"train__packs_per_step": 3, "train__max_steps": 10, "train__epochs": 9.0, "train__save_every_steps": 2}
"""30 packs of 14, so that each set ends at least once."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs' folders by name: `whole`, `killed` after 5 steps and taken up, `moved` from two ranks to one, `spread`
    from one to two; on one rank `alone` on a set, `one` on a mixture of it."""
    root = tmp_path_factory.mktemp("mixture")
    packs = make_mixture(root / "data").folder
    alone = make_sets(root / "single", red=9)
    only = mixed(root / "single", alone, "passes", {"red": 1.0}, "repeat")
    only.write()

    def scenario(name, where=packs, **more):
        one = {"name": name, "packs": str(where), "output": str(root / name), "changes": CHANGES, "resume": True}
        return {**one, "ds": {"zero_optimization": {"stage": 2}}, "keeps_scalars": True, **more}

    two = [scenario("whole"), scenario("killed", dies_at=5), scenario("killed"), scenario("moved", dies_at=5)]
    one = [
        scenario("moved"),
        scenario("spread", dies_at=5),
        scenario("alone", alone["red"].folder),
        scenario("one", only.folder),
    ]
    for turn, (number, lives) in enumerate(((2, two), (1, one), (2, [scenario("spread")]))):
        file = root / f"scenarios-{turn}.json"
        file.write_text(json.dumps(lives))
        run_ranks("tests.train.fault_worker", [str(file)], number, root / f"log-{turn}")
    return root


def result(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "result.safetensors")


def test_losses_are_the_plain_loops(runs):
    packs = Path(read_receipt(runs / "whole" / RECEIPT).header.packs)
    expected = plain_run(packs, CHANGES)["losses"]
    for name in ("whole", "moved", "spread"):
        assert torch.allclose(result(runs / name)["losses"], expected, rtol=1e-5, atol=0), name


def test_killed_and_taken_up_is_bit_identical(runs):
    for name in ("log.jsonl", "history.bin", RECEIPT):
        assert (runs / "killed" / name).read_bytes() == (runs / "whole" / name).read_bytes(), name
    found, expected = result(runs / "killed"), result(runs / "whole")
    assert [key for key in expected if key.startswith("weight/") and not torch.equal(found[key], expected[key])] == []


def test_receipts_prove_each_set(runs):
    proof = prove(runs / "moved", None, runs / "whole", tolerance=1e-5)
    assert proof.failures == []
    packs = open_packed(read_receipt(runs / "moved" / RECEIPT).header.packs)
    for name, part in packs.sets.items():
        count = part.manifest.num_samples
        assert f"{name}, pass 0: {count} of {count} samples once" in proof.facts, name
    assert any(fact.startswith("blue, pass 1: ") for fact in proof.facts)


def test_a_receipt_that_says_other_counts_fails(runs, tmp_path):
    lines = (runs / "whole" / RECEIPT).read_text().splitlines()
    assert '"sets": {"red"' in lines[1]
    (tmp_path / RECEIPT).write_text("\n".join([lines[0], lines[1].replace('"tokens": ', '"tokens": 9', 1)]) + "\n")
    assert "was changed" in str(read_receipt(tmp_path / RECEIPT).problem)


def test_figures_of_each_set_are_those_of_a_plain_count(runs):
    run = runs / "killed"
    header = read_receipt(run / RECEIPT).header
    packs = open_packed(header.packs)
    plan, history = plan_of(header, packs), read_history(run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scalars = [json.loads(line) for line in (run / "scalars.jsonl").read_text().splitlines()]
    logged = {(step, name): value for step, name, value in scalars}
    seen, tokens, num_packs = defaultdict(int), defaultdict(int), defaultdict(int)
    for step, line in enumerate(lines):
        names = [name for pack in plan.packs_of(step).tolist() for name in packs.sample_ids(pack)]
        losses = defaultdict(list)
        for name, loss in zip(names, history.losses(step).tolist(), strict=True):
            losses[name.partition("/")[0]].append(loss)
            seen[name.partition("/")[0]] += 1
        for pack in plan.packs_of(step).tolist():
            one = packs.sample_ids(pack)[0].partition("/")[0]
            tokens[one] += len(packs.row(pack).input_ids)
            num_packs[one] += 1
        for name, part in packs.sets.items():
            if name in losses:
                assert line[f"loss/{name}"] == pytest.approx(np.mean(losses[name]), rel=1e-6)
                assert logged[step, f"train/loss_by_set/{name}"] == line[f"loss/{name}"]
            assert (line[f"samples/{name}"], line[f"tokens/{name}"]) == (seen[name], tokens[name])
            assert line[f"passes/{name}"] == num_packs[name] / len(part)
    assert logged[4, "data/samples_of_set/red"] == lines[4]["samples/red"]
    assert num_packs["red"] + num_packs["blue"] == 30 and lines[-1]["passes/blue"] > 1


def test_a_mixture_of_one_set_is_that_set_bit_for_bit(runs):
    alone, one = result(runs / "alone"), result(runs / "one")
    assert alone.keys() == one.keys()
    assert [key for key in alone if not torch.equal(alone[key], one[key])] == []
    first, second = (read_history(runs / name) for name in ("alone", "one"))
    assert first.words.tobytes() == second.words.tobytes()
    told = [json.loads(line) for line in (runs / "one" / "log.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (runs / "alone" / "log.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in plain[0]} for line in told] == plain
