"""Losses by category: the mean over the samples of a few steps, by what their lines say of them, also over a kill."""

import json
from collections import defaultdict

import numpy as np
import pytest

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.metrics.categories import MOST_VALUES, CategoryLosses, read_categories
from vltrain.receipts.history import read_history

EVERY, NUM_STEPS = 3, 7


def record(name, images=(), **metadata):
    return {"id": name, "images": list(images), "turns": [], "metadata": metadata}


def write_samples(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_what_counts_as_a_category(tmp_path):
    many = [record(f"m{number}", topic=f"topic {number}") for number in range(MOST_VALUES + 1)]
    samples = [
        record("a", ["x.png"], subject="language", kind="one", question="which?", grade="grade 2"),
        record("b", subject="natural science", kind="one", grade=" "),
        record(7, source="web"),
        {"id": "no metadata", "turns": []},
    ]
    path = write_samples(tmp_path / "train.jsonl", [*samples, *many])
    found = read_categories({"": path}).of(["b", "elsewhere", "a", "7", "no metadata", "m3"])
    without = {"images": "without"}
    # One value is no category, and so are more than can be drawn, and keys that are not of a kind.
    assert found == [
        {"subject": "natural science", **without},
        {},
        {"subject": "language", "images": "with"},
        without,
        without,
        without,
    ]
    assert read_categories({"": write_samples(tmp_path / "empty.jsonl", [])}).of(["a"]) == [{}]


def test_means_over_the_steps_since_the_last_time(tmp_path):
    kinds = {"a": "x", "b": "y", "c": "x", "d": "y"}
    path = write_samples(tmp_path / "train.jsonl", [record(name, kind=kind) for name, kind in kinds.items()])
    steps = [["a", "b"], ["c", "elsewhere"], ["d", "a"], ["b"]]
    losses = [np.array(values, np.float32) for values in ([1, 2], [4, 99], [np.nan, 7], [3])]
    one = CategoryLosses({"": path}, steps.__getitem__, every=2)
    assert one.add(0, losses[0]) == {} and one.describe() == ""
    assert one.add(1, losses[1]) == {"train/loss_by_kind/x": 2.5, "train/loss_by_kind/y": 2.0}
    assert one.describe() == "mean loss by category (samples), steps 0 to 1: kind/x 2.5 (2), kind/y 2 (1)"
    assert one.describe() == "" and one.add(2, losses[2]) == {}
    resumed = CategoryLosses({"": path}, steps.__getitem__, every=2, first_step=3, recent=losses[2:3])
    expected = {"train/loss_by_kind/x": 7.0, "train/loss_by_kind/y": 3.0}
    assert one.add(3, losses[3]) == resumed.add(3, losses[3]) == expected


def test_no_samples_or_broken_ones_end_nothing(tmp_path, caplog):
    nothing = CategoryLosses({}, [["a"]].__getitem__, every=1)
    assert nothing.add(0, np.ones(1, np.float32)) == {} and nothing.describe() == ""
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": "a"\n')
    broken = CategoryLosses({"": path}, lambda step: ["a"], every=1)
    assert broken.add(0, np.ones(1, np.float32)) == {} == broken.add(1, np.ones(1, np.float32))
    assert caplog.text.count("losses by category are not logged") == 1 and "train.jsonl:1" in caplog.text


def test_real_ranks_log_them_the_same_over_a_kill(tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(7))
    dataset = PackedDataset(packs)
    names = [name for pack in range(len(dataset)) for name in dataset.sample_ids(pack)]
    kind_of = {name: ("one", "two", "three")[number % 3] for number, name in enumerate(names)}
    write_samples(tmp_path / "data/samples/train.jsonl", [record(name, kind=kind_of[name]) for name in names])
    changes = {"train__packs_per_step": 3, "train__max_steps": NUM_STEPS, "train__epochs": 9.0}
    changes |= {"train__save_every_steps": 2, "train__log_every_steps": EVERY, "data__root": str(tmp_path / "data")}

    def scenario(name, **more):
        one = {"name": name, "packs": str(packs), "output": str(tmp_path / name), "changes": changes, "resume": True}
        return {**one, "ds": {"zero_optimization": {"stage": 3}}, "keeps_scalars": True, **more}

    lives = [scenario("whole"), scenario("killed", dies_at=5), scenario("killed")]
    (tmp_path / "scenarios.json").write_text(json.dumps(lives))
    run_ranks("tests.train.fault_worker", [str(tmp_path / "scenarios.json")], 2, tmp_path / "log")
    history = read_history(tmp_path / "whole")
    plan = Plan(dataset.index, seed=0, epochs=9.0, packs_per_step=3, world_size=1, cost=PackCost())
    expected = {}
    for last in (2, 5):
        found = defaultdict(list)
        for step in range(last - EVERY + 1, last + 1):
            ids = [name for pack in plan.packs_of(step).tolist() for name in dataset.sample_ids(pack)]
            for name, loss in zip(ids, history.losses(step).tolist(), strict=True):
                found[kind_of[name]].append(loss)
        expected |= {(last, f"train/loss_by_kind/{kind}"): np.mean(values) for kind, values in found.items()}
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "scalars.jsonl").read_text().splitlines()]
        logged = {(step, tag): value for step, tag, value in lines if tag.startswith("train/loss_by_")}
        assert logged == pytest.approx(expected, rel=1e-6), name
