"""A folder in which the pages' commands are run: a checkout after the quickstart, with a few samples of all raw data.

easy-VQA is a package of 240 images there, so that the default recipe itself is prepared, packed, trained and evaluated
in seconds.
"""

from __future__ import annotations

import atexit
import base64
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from tests.attacks.inputs import chat, sample, write_json, write_jsonl
from tests.data_prep import test_official_layouts as official
from tests.support import tables
from tests.support.processes import ROOT

LINKED = ("launch", "ds_configs", "data_prep", "vltrain", "tests", "setup.cfg")
SITE = "site"  # what stands in front of installed packages there
COLOURS = ("red", "green", "blue", "yellow", "brown", "black", "gray", "teal")
SHAPES = ("circle", "rectangle", "triangle")


def make_world(folder: Path) -> Path:
    """A copy of it in an empty folder."""
    shutil.copytree(_template(), folder, symlinks=True, dirs_exist_ok=True)
    return folder


def environment(world: Path) -> dict[str, str]:
    """For processes that run there."""
    path = os.pathsep.join((str(world / SITE), str(ROOT)))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@functools.cache
def _template() -> Path:
    world = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, world, ignore_errors=True)
    for name in LINKED:
        (world / name).symlink_to(ROOT / name)
    easyvqa(world / SITE / "easy_vqa")
    words = [sys.executable, "-m", "vltrain", "train", "--recipe", "quickstart", "--ds", "zero2"]
    done = subprocess.run(words, cwd=world, env=environment(world), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("again", "photos", "mine"):
        shutil.copytree(world / "runs" / "quickstart", world / "runs" / name)
    shutil.copy(world / "data" / "easyvqa" / "samples" / "images" / "test" / "0.png", world / "shape.png")
    raw_data(world)
    return world


def easyvqa(package: Path) -> None:
    """An `easy_vqa` of 200 images for val, 30 to train on and 10 to test on."""
    draw = random.Random(0)
    for part, num_images in (("train", 230), ("test", 10)):
        images, questions = package / "data" / part / "images", []
        images.mkdir(parents=True)
        for number in range(num_images):
            colour, shape = draw.choice(COLOURS), draw.choice(SHAPES)
            drawing(colour, number).save(images / f"{number}.png")
            asked = [
                ("what is the color of the shape?", colour),
                ("what shape is in the image?", shape),
                (f"is there a {colour} shape?", "yes"),
                (f"is there a {shape}?", "yes"),
            ]
            questions += [
                [question, answer, number]
                for question, answer in (asked if part == "test" else asked * 3 if number < 30 else asked[:1])
            ]
        write_json(package / "data" / part / "questions.json", questions)
    (package / "__init__.py").write_text("")


def drawing(colour: str, number: int) -> Image.Image:
    """One of its own for each number."""
    image = Image.new("RGB", (64, 64), (235, 235, number % 256))
    ImageDraw.Draw(image).rectangle((10 + number % 7, 12, 40, 44), fill=colour)
    return image


def raw_data(world: Path) -> None:
    """The files that the pages' commands name."""
    (world / "photos").mkdir()
    talks = []
    for number in range(40):
        name, colour = f"IMG_{number:04d}.jpg", COLOURS[number % 4]
        drawing(colour, number).save(world / "photos" / name)
        talks += [
            chat(f"{number}-{kind}", question=f"<image>\n{asked}", answer=said, image=name)
            for kind, (asked, said) in enumerate((("What colour is it?", colour), ("Is it red?", "no")))
        ]
    write_json(world / "photos" / "chats.json", talks)
    columns = {"question": "query", "answer": "label", "image": "image"}
    charts = [{columns[name]: value for name, value in row.items()} for row in tables.rows()]
    tables.as_parquet(world / "charts", made=charts)
    write_jsonl(world / "chats.jsonl", [{"messages": one["conversations"], "images": [one["image"]]} for one in talks])
    for split in ("train", "val"):
        write_jsonl(
            world / "mine" / f"{split}.jsonl",
            [
                sample(f"{split}{number}", question="<image>\nWhat is this?", images=[f"{split}{number}.png"])
                for number in range(3)
            ],
        )
        for number in range(3):
            drawing("red", number + (100 if split == "val" else 0)).save(world / "mine" / f"{split}{number}.png")
    shutil.copytree(world / "mine", world / "data" / "mine" / "samples")
    scienceqa(world / "data" / "ScienceQA")
    shutil.copytree(official.iconqa(world / "made"), world / "iconqa_data")
    vizwiz(world / "data" / "VizWiz")
    flickr = official.flickr(world / "data" / "flickr30k", 3)
    write_json(
        flickr / "dataset_flickr30k.json",
        {
            "images": [
                official.karpathy(f"{number}.jpg", split, "A shape.")
                for number, split in enumerate(("train", "val", "test"))
            ]
        },
    )
    answers(world)
    (world / "corpus.txt").write_text(
        "".join(
            f"a {colour} {shape} and {number} more, please\n"
            for number, colour in enumerate(COLOURS * 20)
            for shape in SHAPES
        )
    )
    (world / "MMBench_DEV_EN.tsv").write_text(mmbench(world / "shape.png"))


def scienceqa(folder: Path) -> None:
    """A question with an image in each split."""
    problem = {
        "question": "Which is it?",
        "choices": ["a cat", "a dog"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "subject": "natural science",
        "topic": "biology",
        "category": "animals",
        "skill": "tell",
        "grade": "grade2",
        "task": "closed choice",
        "lecture": "Cats purr.",
        "solution": "It purrs.",
    }
    splits = {split: [str(number)] for number, split in enumerate(("train", "val", "test"))}
    write_json(folder / "problems.json", {pid: {**problem, "split": split} for split, (pid,) in splits.items()})
    write_json(folder / "pid_splits.json", splits)
    for number, (split, (pid,)) in enumerate(splits.items()):
        place = folder / "images" / split / pid
        place.mkdir(parents=True)
        drawing("teal", number).save(place / "image.png")


def vizwiz(folder: Path) -> None:
    for split in ("train", "val"):
        official.vizwiz(
            folder, [official.photo(["red"] * 10, image=f"{split}{number}.jpg") for number in range(3)], split
        )
        for number in range(3):
            drawing("red", number + (100 if split == "val" else 0)).save(folder / split / f"{split}{number}.jpg")


def answers(world: Path) -> None:
    """Files of answers, the questions that they answer, and a run whose samples have candidates."""
    shutil.copytree(world / "data" / "ScienceQA", world / "ScienceQA" / "data" / "scienceqa")
    write_jsonl(world / "answers.jsonl", [{"id": "2", "prediction": "The answer is (A)."}])
    facts = {
        "question_type": "choose_txt",
        "choices": ["one", "two"],
        "answer": 1,
        "candidates": ["(a) one", "(b) two"],
        "grade": "grade1",
        "label": "L",
        "skills": ["counting"],
    }
    ranked = [
        sample(
            number,
            question="Question: How many? Options: (a) one (b) two. Short answer:",
            answer="(b) two",
            metadata=facts,
        )
        for number in range(2)
    ]
    write_jsonl(world / "data" / "iconqa" / "samples" / "val.jsonl", ranked)
    write_json(world / "answers.json", {"0": "(b) two", "1": "(a) one"})
    write_jsonl(world / "data" / "ranked" / "samples" / "test.jsonl", ranked)
    recipe, of_packs = world / "runs" / "mine" / "config.yaml", world / "runs" / "mine" / "run.json"
    recipe.write_text(recipe.read_text().replace("root: data/easyvqa", "root: data/ranked"))
    of_packs.unlink()


def mmbench(image: Path) -> str:
    """Two questions as VLMEvalKit has them."""
    picture = base64.b64encode(image.read_bytes()).decode()
    rows = [
        ["index", "image", "question", "A", "B"],
        ["0", picture, "What is it?", "a shape", "a cat"],
        ["1", "0", "Is it red?", "yes", "no"],
    ]
    return "".join("\t".join(row) + "\n" for row in rows)
