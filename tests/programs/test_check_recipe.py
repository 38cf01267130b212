"""`vltrain check recipe` as a user starts it: what its exit code and its lines say, and that nothing is left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.attacks.attack import run_vltrain
from tests.attacks.inputs import pack_words
from tests.support.altered_packs import alter, labels_on_the_question
from tests.support.finished_run import finished_run
from tests.support.processes import vltrain
from tests.support.tiny import random_png
from vltrain.schema import IMAGE_MARKER

NUM_SAMPLES = 40
WORDS = ("red", "blue", "green", "grey", "black", "white", "yellow", "brown")


def write_samples(folder: Path, split: str, seed: int, answer: str = "{}") -> None:
    """Each asks something of its own about an image of its own."""
    draw = np.random.default_rng(seed)
    (folder / "images" / split).mkdir(parents=True)
    lines = []
    for number in range(NUM_SAMPLES):
        name = f"images/{split}/{number}.png"
        (folder / name).write_bytes(random_png(draw))
        asked = " ".join(draw.choice(WORDS, 6))
        turns = [
            {"role": "user", "text": f"{IMAGE_MARKER}\nQuestion: is it {asked}?\nAnswer:"},
            {"role": "assistant", "text": answer.format(draw.choice(WORDS))},
        ]
        lines.append({"id": f"{split}/{number}", "images": [name], "turns": turns, "metadata": {}})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    places = finished_run(tmp_path_factory.mktemp("check"))
    shutil.rmtree(places.root / "data")
    samples = places.root / "mine"
    for seed, split in enumerate(("train", "test")):
        write_samples(samples, split, seed)
    return places


def check(places, samples: Path, *words: str) -> tuple[int, list[str]]:
    """Exit code and lines. The recipe is the run's, on other samples."""
    done = vltrain(
        "check",
        "recipe",
        str(places.recipe),
        *("--data.train_packs", "null", "--data.source", "samples", "--data.input", str(samples)),
        *(
            "--data.root",
            str(places.root / f"{samples.name}-packed"),
            "--data.options.test",
            str(samples / "test.jsonl"),
        ),
        *("--data.pack_length", "128", "--output", str(places.root / "nowhere")),
        *words,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert not (places.root / "nowhere").exists()
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_a_recipe_that_is_right(place):
    code, lines = check(place, place.root / "mine")
    assert code == 0, lines
    assert not [line for line in lines if line.startswith("FAILED")]
    for what in ("rehearsal", "planned memory", "trained parameters", "frozen parameters", "isolation", "loss scale"):
        assert [line for line in lines if line.startswith(f"ok      {what}: ")], what
    assert sum(line.startswith("ok      labels of ") for line in lines) == 3


def test_images_of_the_test_in_train_and_answers_longer_than_generation_allows(place):
    samples = place.root / "faulty"
    write_samples(samples, "train", 0)
    write_samples(samples, "test", 1, answer="{} because of what can be seen in the picture")
    for number in range(20):
        shutil.copy(samples / "images" / "test" / f"{number}.png", samples / "images" / "train" / f"{number}.png")
    code, lines = check(place, samples, "--eval.max_new_tokens", "3")
    failed = [line for line in lines if line.startswith("FAILED")]
    assert code == 1
    assert any("images of 'test' in 'train': 20 of 40 are trained on" in line for line in failed), lines
    assert any("longest answers of 'test'" in line for line in failed), lines


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.chek", "full"], "unknown option '--train.chek', did you mean 'train.check'?"),
        (["--data.train_split", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, words, told):
    code, lines = check(place, place.root / "mine", *words)
    assert code == 2 and told in lines[-1], lines


@pytest.mark.slow
def test_labels_on_the_question_at_two_ranks(place):
    """Given packs, of samples that lie beside the test's: shards whose loss lies on what is asked."""
    samples, packs = place.root / "mine", place.root / "planted"
    code, output = run_vltrain(pack_words(samples / "train.jsonl", packs, pack_length=128))
    assert code == 0, output
    alter(packs, labels_on_the_question)
    code, lines = check(place, samples, "--data.train_packs", str(packs), "--ranks", "2", "--ds", "zero2")
    failed = [line for line in lines if line.startswith("FAILED")]
    assert code == 1 and len(failed) == 2, lines
    assert failed[0].startswith("FAILED  labels: ") and "the model would learn to say something else" in failed[0]
    assert failed[1].startswith("FAILED  packs and samples: ") and "carries loss and should not" in failed[1]
