"""A mixture as a user trains it: drawn shapes and own samples; and every program that reads its packs after."""

import json
import shutil

import pytest

from tests.attacks.attack import run_vltrain
from tests.programs.test_check_recipe import write_samples
from tests.support.finished_run import finished_run
from tests.support.processes import vltrain
from vltrain.config.recipe import dump_config
from vltrain.receipts.receipt import RECEIPT, read_receipt

NUM_STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe of two sets and its run."""
    places = finished_run(tmp_path_factory.mktemp("mixed"))
    shutil.rmtree(places.run)
    for seed, split in enumerate(("train", "test")):
        write_samples(places.root / "mine", split, seed)
    drawn = {"train_images": 10, "val_images": 2, "test_images": 3}
    mixture = {
        "own": {"weight": 3, "source": "samples", "input": str(places.root / "mine")},
        "drawn": {"weight": 1, "source": "shapes", "options": drawn, "scorer": "iconqa", "eval_split": "val"},
    }
    settings = {"data__mixture_by": "samples", "data__pack_length": 128, "data__train_packs": None}
    config = places.config(
        data__root=str(places.root / "both"), data__mixture=mixture, eval__max_samples=5, train__epochs=9.0, **settings
    )
    places.recipe.write_text(dump_config(config))
    done = vltrain("train", "--recipe", str(places.recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    (places.root / "train.log").write_text(done.stdout + done.stderr)
    return places


def program(*words) -> str:
    code, output = run_vltrain([str(word) for word in words])
    assert code == 0, output
    return output


def mixed_folder(place):
    return read_receipt(place.run / RECEIPT).header.packs


def test_it_says_what_it_trains_on_and_how_each_set_does(place):
    told = (place.root / "train.log").read_text()
    assert "own: " in told and "passes" in told and "unweighted mean of 2 set(s)" in told
    figures = {
        name: json.loads((place.run / "eval" / name / "metrics.json").read_text()) for name in ("own/test", "drawn/val")
    }
    assert (figures["own/test"]["scorer"], figures["drawn/val"]["scorer"]) == ("exact", "iconqa")
    assert [one["total"] for one in figures.values()] == [5, 5]
    mean = json.loads((place.run / "eval/mean_of_sets/test-val.json").read_text())
    assert mean["unweighted_mean"] == pytest.approx(sum(one["accuracy"] for one in figures.values()) / 2)
    data = json.loads((place.run / "run.json").read_text())["data"]
    assert data["sets"].keys() == {"own", "drawn"} == data["mixture"]["packs"].keys()
    assert all(one["samples"] for one in data["sets"].values())


def test_other_weights_are_another_run(place):
    code, told = run_vltrain(["train", "--recipe", str(place.recipe), "--data.mixture.own.weight", "2"])
    assert code == 2 and "mixture.weights.own was 3.0, is 2.0" in told, told


def test_evaluation_answers_each_set_by_its_scorer(place):
    done = vltrain(
        "evaluate", str(place.run), "--split", "test", "--eval.max_samples", "4", "--json", str(place.root / "all.json")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().split("\n")[-1].startswith("unweighted mean of 2 set(s): 0.")
    found = json.loads((place.root / "all.json").read_text())
    assert {name: one["scorer"] for name, one in found["sets"].items()} == {"own": "exact", "drawn": "iconqa"}
    assert (place.run / "eval/drawn/test/predictions.jsonl").is_file()


def test_a_plan_shows_the_sets(place):
    told = program("plan", place.recipe, "--json", place.root / "plan.json")
    sets = json.loads((place.root / "plan.json").read_text())["sets"]
    assert sum(one["trained_packs"] for one in sets.values()) == NUM_STEPS and "own: " in told
    assert sum(one["share"] for one in sets.values()) == pytest.approx(1)


def test_the_run_and_its_packs_are_proven(place):
    assert "own, pass 0" in program("check", "resume", place.run)
    assert "every byte as it was packed" in program("check", "data", mixed_folder(place))
    assert "own/" in program("peek", mixed_folder(place))


@pytest.mark.slow
def test_steps_are_done_again_and_blamed_by_set(place):
    for words in (("check", "replay", str(place.run), "--step", "2"), ("blame", str(place.run), "--step", "2")):
        done = vltrain(*words, folder=place.root)
        told = done.stdout + done.stderr
        assert done.returncode == 0 and ("own/" in told or "drawn/" in told), told


@pytest.mark.slow
def test_the_check_reports_on_each_set(place):
    done = vltrain("check", "recipe", str(place.recipe), "--output", str(place.root / "nowhere"))
    assert done.returncode in (0, 1) and "own: " in done.stdout and "drawn: " in done.stdout, done.stderr
    assert "ok      trained parameters" in done.stdout
