"""The report on a recipe's data: what must be found is found, and what comes by itself raises no alarm."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.pack import PackSettings, pack
from vltrain.config.schema import Config, DataConfig, EvalConfig
from vltrain.data.report import packed
from vltrain.data.report.alike import compare
from vltrain.data.report.finding import FAILED, OK, WARNING, Finding
from vltrain.data.report.looks import look_at, near_images
from vltrain.data.report.overlap import overlaps, repeats
from vltrain.data.report.report import data_report
from vltrain.data.report.samples import read_split
from vltrain.data.report.texts import NEAR, SHINGLE, digest_of, near_texts, normalised, sketch_of
from vltrain.data.shards import PackedDataset
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.evaluate.questions import judge_of

DATA = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", Path(__file__).parents[3] / "shared" / "data"))
ICONS = DATA / "iconqa_mini"
COLORS = ("red", "green", "blue", "white")
TOKENIZER = "asset://tiny_llama"


def drawing(seed: int) -> Image.Image:
    """A few rectangles on a ground, none like another."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((120, 160, 3), np.uint8)
    pixels[:] = rng.integers(0, 256, 3)
    for _ in range(4):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, edge, 2)) for edge in (120, 160))
        pixels[top : bottom + 12, left : right + 12] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def sample(number: int, image: str | None, question: str, answer: str, split: str) -> dict[str, Any]:
    marker = "" if image is None else "<image>\n"
    turns = [
        {"role": "user", "text": f"{marker}Question: {question}\nAnswer:"},
        {"role": "assistant", "text": answer},
    ]
    images = [] if image is None else [image]
    return {"id": f"{split}/{number}", "images": images, "turns": turns, "metadata": {}}


def write(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def make_set(folder: Path, num_train: int = 60, num_test: int = 30) -> dict[str, list[dict[str, Any]]]:
    """Two questions about each drawing; images of their own in each split."""
    (folder / "images").mkdir(parents=True)
    splits: dict[str, list[dict[str, Any]]] = {}
    first = 0
    for split, count in (("train", num_train), ("test", num_test)):
        splits[split] = []
        for number in range(first, first + count):
            name = f"images/{number}.png"
            drawing(number).save(folder / name)
            for question in ("what color is it?", "is it red?"):
                answer = COLORS[number % 4] if "what" in question else ("yes", "no")[number % 2]
                splits[split].append(sample(len(splits[split]), name, question, answer, split))
        first += count
    write(folder, splits)
    return splits


def copy_of(image: Image.Image, scale: float, quality: int) -> bytes:
    data = io.BytesIO()
    size = round(image.width * scale), round(image.height * scale)
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=quality)
    return data.getvalue()


def found(folder: Path) -> dict[str, Finding]:
    train, test = (read_split(name, folder / f"{name}.jsonl") for name in ("train", "test"))
    alike = compare([train, test], 10**7)
    return {one.what: one for one in [repeats(train, alike), *overlaps(train, test, alike)]}


def test_texts_that_are_nearly_the_same_are_those_that_share_their_shingles():
    rng = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    texts = [" ".join(rng.choices(words, k=80)) for _ in range(60)]
    for text in texts[:20]:  # another word in the middle; further ones with half of the text
        parts = text.split()
        texts += [" ".join([*parts[:40], "other", *parts[41:]]), " ".join([*parts[:40], *rng.choices(words, k=40)])]

    def shingles(text):
        parts = text.split()
        return {tuple(parts[place : place + SHINGLE]) for place in range(len(parts) - SHINGLE + 1)}

    sketches = {digest_of(text): sketch for text in texts if (sketch := sketch_of(text)) is not None}
    assert len(sketches) == len(set(texts))
    same = near_texts(sketches)
    for one, other in itertools.combinations(texts, 2):
        a, b = shingles(one), shingles(other)
        jaccard = len(a & b) / len(a | b)
        if abs(jaccard - NEAR) > 0.07:
            assert (same[digest_of(one)] == same[digest_of(other)]) == (jaccard > NEAR), jaccard
    assert sketch_of("a short question of eight words or so") is None
    assert normalised("<image>\nWhich one?  (A) The CAT.") == "which one a the cat"


@pytest.mark.parametrize("real", [False, True])
def test_copies_look_the_same_and_other_images_do_not(tmp_path, real):
    if real and not ICONS.exists():
        pytest.skip("IconQA's sample is not on this machine")
    images = [Image.open(path).convert("RGB") for path in sorted(ICONS.rglob("image.png"))[:60]] if real else []
    images = images or [drawing(seed) for seed in range(60)]
    files = []
    for number, image in enumerate(images):
        files.append(tmp_path / f"{number}.png")
        image.save(files[-1])
    others = near_images(look_at(files, 10**7))
    # What of the originals is told to be one image is one, but for a few pixels.
    for number, first in enumerate(others):
        if number != first:
            one, other = (np.asarray(images[place].resize((64, 64))).astype(int) for place in (number, first))
            assert np.abs(one - other).mean() < 3, (number, first)
    copies = []
    for number, (image, scale, quality) in enumerate(zip(images, itertools.cycle((0.75, 1, 1.5)), (60, 75, 85) * 20)):
        copies.append(tmp_path / f"copy{number}.jpg")
        copies[-1].write_bytes(copy_of(image, scale, quality))
    same = near_images(look_at([*files, *copies], 10**7))
    hits = sum(same[len(files) + number] == others[number] for number in range(len(files)))
    assert hits >= 0.9 * len(files), hits


@pytest.mark.parametrize("kind", ["mirrored", "smaller", "larger"])
def test_copies_that_were_mirrored_or_resized_look_the_same(tmp_path, kind):
    change = {
        "mirrored": ImageOps.mirror,
        "smaller": lambda image: image.resize((96, 72), Image.Resampling.BICUBIC),
        "larger": lambda image: image.resize((400, 300), Image.Resampling.LANCZOS),
    }[kind]
    files = [tmp_path / f"{number}.png" for number in range(60)]
    for number, file in enumerate(files[:30]):
        drawing(number).save(file)
        change(drawing(number)).save(files[30 + number])
    same = near_images(look_at(files, 10**7))
    assert same[:30] == [*range(30)] and sum(same[30 + number] == number for number in range(30)) >= 27, same


def test_images_that_cannot_be_read_are_like_no_other(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not an image")
    looks = look_at([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "absent.png"], 10**7)
    assert sorted(looks.unread) == [0, 1, 2] and near_images(looks) == [0, 1, 2]


def test_splits_of_their_own_images_have_nothing_in_common(tmp_path):
    make_set(tmp_path / "set")
    assert {one.status for one in found(tmp_path / "set").values()} == {OK}


@pytest.mark.parametrize("question", ["the test's", "another"])
def test_copies_of_test_images_in_train_fail_and_are_named(tmp_path, question):
    splits = make_set(tmp_path)
    for number in range(12):
        (tmp_path / f"images/planted{number}.jpg").write_bytes(
            copy_of(drawing(60 + number), (0.75, 1, 1.5)[number % 3], (60, 75, 85)[number % 3])
        )
        text = "what color is it?" if question == "the test's" else f"what is thing {number}?"
        splits["train"].append(sample(1000 + number, f"images/planted{number}.jpg", text, "red", "train"))
    write(tmp_path, splits)
    lines = found(tmp_path)
    images = lines["images of 'test' in 'train'"]
    assert images.status == FAILED and "test/0 shows what train/1000 does" in images.examples, images.line()
    asked = lines["'test' asked in 'train'"]
    assert asked.status == (FAILED if question == "the test's" else OK), asked.line()
    if question == "the test's":
        assert "test/0 is train/1000" in asked.examples


@pytest.mark.parametrize("written", [str.upper, lambda text: text.replace(" ", "  \n"), lambda text: f" {text}!"])
def test_questions_of_the_test_written_otherwise_are_the_same(tmp_path, written):
    records = [sample(number, None, f"what is the sum of {number} and {number + 1}?", "x", "s") for number in range(99)]
    splits = {"train": records[:60], "test": records[60:]}
    for one in records[60:70]:
        turns = [{**turn, "text": written(turn["text"])} for turn in one["turns"]]
        splits["train"] = [*splits["train"], {**one, "id": f"leak/{one['id']}", "turns": turns}]
    told = found(write(tmp_path, splits))["'test' asked in 'train'"]
    assert told.status == FAILED and told.found.startswith("10 of 39"), told.line()


def test_texts_of_the_test_in_train_fail(tmp_path):
    records = [
        sample(number, None, f"what is the sum of {number} and {number + 1}?", "x", "s") for number in range(300)
    ]
    splits = {"train": records[:200], "test": records[200:]}
    assert found(write(tmp_path, splits))["'test' asked in 'train'"].status == OK
    leaked = [*records[:200], *({**one, "id": f"leak/{one['id']}"} for one in records[200:210])]
    told = found(write(tmp_path, {**splits, "train": leaked}))["'test' asked in 'train'"]
    assert told.status == FAILED and told.found.startswith("10 of 100") and told.examples[0] == "s/200 is leak/s/200"


@pytest.mark.parametrize("seed", range(5))
def test_a_random_split_of_samples_that_repeat_each_other_does_not_fail(tmp_path, seed):
    """Questions and images come from small sets, so that many of the test's are trained on by chance."""
    rng = random.Random(seed)
    (tmp_path / "images").mkdir()
    records = []
    for number in range(400):
        name = f"images/{number}.png"  # a file of its own for each, as ScienceQA and IconQA have them
        drawing(rng.randrange(600)).save(tmp_path / name)
        records.append(sample(number, name, rng.choice(("a?", "b?", "c?")), "x", "s"))
    rng.shuffle(records)
    lines = found(write(tmp_path, {"train": records[:280], "test": records[280:]}))
    assert all(lines[what].status != FAILED for what in lines), [one.line() for one in lines.values()]
    assert not lines["images of 'test' in 'train'"].found.startswith("0 of")


def test_a_split_by_question_is_told_and_does_not_fail(tmp_path):
    both = make_set(tmp_path)["train"]
    told = found(write(tmp_path, {"train": both[0::2], "test": both[1::2]}))["images of 'test' in 'train'"]
    assert told.status == WARNING and "split by image" in told.found


def test_repeated_and_contradicting_samples_are_counted(tmp_path):
    splits = make_set(tmp_path)
    twice = [{**one, "id": f"again/{one['id']}"} for one in splits["train"][:30]]
    told = found(write(tmp_path, {**splits, "train": [*splits["train"], *twice]}))["repeated samples"]
    assert (
        told.status == WARNING
        and told.found.startswith("30 of 150 repeat")
        and "train/0 and again/train/0" in told.examples
    )
    for one in twice:
        one["turns"] = [one["turns"][0], {"role": "assistant", "text": "something else"}]
    told = found(write(tmp_path, {**splits, "train": [*splits["train"], *twice]}))["repeated samples"]
    assert told.status == WARNING and "30 answer otherwise" in told.found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recipe of own samples, their packs and the encoder that made them."""
    root = tmp_path_factory.mktemp("world")
    make_set(root / "samples")
    encoder = TemplateEncoder(load_tokenizer(TOKENIZER), "mmt", 4)
    settings = PackSettings(tokenizer=TOKENIZER, visual_tokens=4, pack_length=256)
    pack(root / "samples" / "train.jsonl", root / "packs", settings, workers=1)
    config = Config(
        data=DataConfig(source="samples", input=str(root / "samples"), root=str(root / "root"), eval_split="test")
    )
    return config, PackedDataset(root / "packs"), encoder


def test_the_report_of_sound_data_has_no_alarm(world):
    config, packs, encoder = world
    lines = data_report(config, packs, encoder, judge_of(config))
    assert {one.status for one in lines} == {OK}, [one.line() for one in lines]
    by_name = {one.what: one.found for one in lines}
    assert "120 samples in" in by_name["packs"]
    assert "decoded they are the answers of 120" in by_name["labels"]
    assert by_name["images of 'test'"].startswith("30 shown by 60 samples") and "all 160" in by_name["images of 'test'"]
    assert "'no' 25%" in by_name["answers of 'train'"]


def test_loss_on_the_question_fails(world):
    config, packs, encoder = world
    said = {"a": ("red",), "b": ("blue",)}
    answer = encoder.tokenizer.encode("red")
    question = encoder.tokenizer.encode("Question: what color is it?\nAnswer:")
    tokens = np.array([*question, *answer, encoder.tokenizer.eos_id], np.int32)
    mask = np.arange(len(tokens)) >= len(question)

    def labels(name, loss):
        return packed.labels([packed.Part(name, tokens, loss)], said, encoder.tokenizer, encoder.stop_ids)

    assert labels("a", mask).status == OK
    told = labels("a", np.ones(len(tokens), bool))
    assert told.status == FAILED and "Question:whatcolorisit?" in told.examples[0]
    assert labels("a", np.arange(len(tokens)) >= len(question) - 1).status == FAILED
    assert labels("a", np.zeros(len(tokens), bool)).status == FAILED
    assert labels("b", mask).status == FAILED  # another sample's answer
    assert packed.labels(
        [packed.Part("a", np.array([-1, *tokens], np.int32), np.array([True, *mask]))], said, encoder.tokenizer, ()
    ).examples == ("a: labels on the places of images",)


def test_answers_that_generation_would_cut_fail_by_the_scorers_word(world, tmp_path):
    config, packs, encoder = world
    long = "red and green and blue and white"
    splits = {"train": [], "test": []}
    for split, number in itertools.product(splits, range(20)):
        splits[split].append(sample(number, None, f"q {number} of {split}", long if number == 3 else "red", split))
    write(tmp_path, splits)
    data = replace(config.data, input=str(tmp_path))

    def longest(**settings):
        recipe = replace(config, data=data, eval=EvalConfig(**settings))
        lines = data_report(recipe, packs, encoder, judge_of(recipe))
        return {one.what: one for one in lines if one.what.startswith("longest")}

    enough = len(encoder.tokenizer.encode(long))
    assert {one.status for one in longest(scorer="exact", max_new_tokens=enough).values()} == {OK}
    told = longest(scorer="exact", max_new_tokens=2)
    assert told["longest answers of 'test'"].status == FAILED
    assert told["longest answers of 'test'"].examples == (f"test/3 with {enough}",)
    assert told["longest answers of 'train'"].status == WARNING
    assert {one.status for one in longest(scorer="exact").values()} == {OK}
    assert {one.status for one in longest(scorer="rouge", max_new_tokens=2).values()} == {OK}  # by degrees


def test_one_answer_that_dominates_and_missing_images_are_told(world, tmp_path):
    config, packs, encoder = world
    records = [sample(number, f"images/{number}.png", f"q {number}", "yes", "test") for number in range(10)]
    (tmp_path / "images").mkdir()
    for number in range(9):
        drawing(number).save(tmp_path / f"images/{number}.png")
    write(tmp_path, {"test": records})
    recipe = replace(config, data=replace(config.data, input=str(tmp_path)))
    lines = {one.what: one for one in data_report(recipe, packs, encoder, judge_of(recipe))}
    assert lines["answers of 'test'"].status == WARNING and "'yes' 100%" in lines["answers of 'test'"].found
    assert lines["images of 'test'"].status == FAILED and "9.png" in lines["images of 'test'"].examples[0]
    assert "not compared with the test" in lines["samples"].found


def test_of_large_splits_the_same_samples_are_drawn_each_time(tmp_path):
    records = [sample(number, None, f"question {number}?", "x", "s") for number in range(50)]
    file = write(tmp_path, {"train": records}) / "train.jsonl"
    one, other = (read_split("train", file, most=20) for _ in range(2))
    assert one.ids == other.ids and len(set(one.ids)) == 20 and one.size == "20 of 50 samples"


def test_the_report_loads_no_torch():
    command = "import sys, vltrain.data.report.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parents[2]).returncode == 0
