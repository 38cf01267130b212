"""Attacks on splits: images that leak from one into another, and sets of a handful of samples."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from data_prep.sources.raw import RawSample
from data_prep.sources.splits import drawn
from tests.attacks.attack import Shown, attack, refused, right, told
from tests.attacks.inputs import chat, picture, prepare_words, sample, write_json
from vltrain.schema import Sample

LEAK = "leakage between splits"
SMALL = "splits of a handful of samples"


def _chats(folder: Path, records: list[dict[str, Any]]) -> Path:
    return write_json(folder / "chats.json", records)


def _chat_about(number: Any, *images: str, question: str = "Q?", answer: str = "yes") -> dict[str, Any]:
    return chat(str(number), question="<image>\n" * len(images) + question, answer=answer, image=list(images))


def _shown(folder: Path) -> dict[str, set[bytes]]:
    """The bytes of the images that each split shows."""
    splits = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")
    }
    return {
        split: {(folder / name).read_bytes() for record in records for name in record["images"]}
        for split, records in splits.items()
    }


def _require_apart(folder: Path, *splits: str) -> Shown:
    shown = _shown(folder)
    assert set(shown) == set(splits), f"splits {sorted(shown)}"
    pairs = [(one, other) for one in splits for other in splits if one < other]
    assert not any(shown[one] & shown[other] for one, other in pairs)
    return right(", ".join(f"{len(shown[split])} images of {split}" for split in splits) + ", none of two")


def _colours(folder: Path, count: int) -> Iterator[str]:
    for number in range(count):
        picture(folder / f"{number}.png", (number % 256, number // 256, 90))
        yield f"{number}.png"


@attack(LEAK)
def several_questions_an_image(folder: Path) -> Shown:
    """LLaVA's JSON with five questions about each image, of which some are held out as val and some as test."""
    records = [
        _chat_about(f"{name}-{place}", name, question=f"{place}?")
        for name in _colours(folder, 60)
        for place in range(5)
    ]
    prepare(
        "llava_json", _chats(folder, records), folder / "out", {"val_fraction": 0.2, "test_fraction": "0.2"}, workers=1
    )
    return _require_apart(folder / "out", "train", "val", "test")


@attack(LEAK)
def one_image_under_two_names(folder: Path) -> Shown:
    """Each image is there twice, as equal files of different names in different folders."""
    records = []
    for name in _colours(folder, 40):
        (folder / "copies").mkdir(exist_ok=True)
        shutil.copy(folder / name, folder / "copies" / f"other-{name}")
        records += [_chat_about(f"a{name}", name), _chat_about(f"b{name}", f"copies/other-{name}")]
    prepare("llava_json", _chats(folder, records), folder / "out", {"val_fraction": 0.3}, workers=1)
    return _require_apart(folder / "out", "train", "val")


@attack(LEAK)
def splits_that_were_right_stay(folder: Path) -> Shown:
    """What is right: records with an image each, or none, are held out by the hash of their ids, as they were before
    images were looked at."""
    names = list(_colours(folder, 150))
    records = [_chat_about(f"i{name}", name) for name in names] + [
        chat(f"t{number}", question=f"{number}?") for number in range(150)
    ]
    prepare("llava_json", _chats(folder, records), folder / "out", {"val_fraction": 0.1}, workers=1)
    held_out = [
        record["id"]
        for record in records
        if int.from_bytes(hashlib.sha256(record["id"].encode()).digest()[:4], "big") < 0.1 * 2**32
    ]
    assert [
        json.loads(line)["id"] for line in (folder / "out" / "val.jsonl").read_text().splitlines()
    ] == held_out and len(held_out) > 10
    return right(f"the same {len(held_out)} of 300")


@attack(LEAK)
def chains_of_images(folder: Path) -> Shown:
    """Samples of two images each, so that one and the next share one: chains of five, which only go into a split as a
    whole."""
    names = list(_colours(folder, 120))
    chains = [names[first : first + 6] for first in range(0, 120, 6)]
    records = [_chat_about(f"{one}+{other}", one, other) for chain in chains for one, other in zip(chain, chain[1:])]
    prepare(
        "llava_json", _chats(folder, records), folder / "out", {"val_fraction": 0.2, "test_fraction": 0.2}, workers=1
    )
    return _require_apart(folder / "out", "train", "val", "test")


@attack(LEAK)
def one_path_in_two_spellings(folder: Path) -> Shown:
    """An image that is called `a.png` in one record and `./a.png` in another."""
    records = [_chat_about(f"{prefix}{name}", prefix + name) for name in _colours(folder, 40) for prefix in ("", "./")]
    prepare("llava_json", _chats(folder, records), folder / "out", {"val_fraction": 0.3}, workers=1)
    return _require_apart(folder / "out", "train", "val")


def _icon(folder: Path, name: str, colour: tuple[int, int, int]) -> None:
    record = {
        "question": "How many?",
        "choices": ["one", "two"],
        "answer": 1,
        "ques_type": "choose_txt",
        "grade": "g",
        "label": "A",
    }
    write_json(folder / "choose_txt" / name / "data.json", record)
    picture(folder / "choose_txt" / name / "image.png", colour)


@attack(LEAK)
def equal_images_of_iconqa(folder: Path) -> Shown:
    """IconQA without splits of its own: every image stands in the folders of three questions."""
    for number in range(90):
        _icon(folder / "raw", str(number), (number // 3, 0, 0))
    prepare("iconqa", folder / "raw", folder / "out", {"val_fraction": 0.2, "test_fraction": 0.2}, workers=1)
    return _require_apart(folder / "out", "train", "val", "test")


@attack(LEAK)
def equal_images_of_flickr30k(folder: Path) -> Shown:
    """Flickr30k without Karpathy's splits: each photo is there under two names."""
    names = [f"{number}{copy}" for number in range(20) for copy in "ab"]
    for name in names:
        picture(folder / "images" / f"{name}.png", (int(name[:-1]), 0, 0))
    (folder / "results_20130124.token").write_text("".join(f"{name}.png#0\tA photo of {name}.\n" for name in names))
    prepare("flickr30k", folder, folder / "out", {"val_images": 6, "test_images": 4}, workers=1)
    return _require_apart(folder / "out", "train", "val", "test")


@attack(LEAK)
def equal_images_of_easyvqa(folder: Path) -> Shown:
    """A folder of easy-VQA's layout in which the last image, held out, equals the first, trained on."""
    for number in range(10):
        picture(folder / "train" / "images" / f"{number}.png", (number % 9, 0, 0))
    picture(folder / "test" / "images" / "0.png", (200, 0, 0))
    write_json(folder / "train" / "questions.json", [["is it red?", "yes", number] for number in range(10)])
    write_json(folder / "test" / "questions.json", [["is it red?", "yes", 0]])
    prepare("easyvqa", folder, folder / "out", {"val_images": 3}, workers=1)
    return _require_apart(folder / "out", "train", "val", "test")


@attack(LEAK)
def official_splits_that_leak(folder: Path) -> Shown:
    """ScienceQA whose test shows an image that is trained on and asks the same about it: told, and left as it is."""
    problem = {
        "question": "Q?",
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "grade": "grade2",
        "subject": "natural science",
        "lecture": "",
        "solution": "",
    }
    write_json(folder / "raw" / "problems.json", {"1": problem, "2": problem, "3": {**problem, "question": "Other?"}})
    write_json(folder / "raw" / "pid_splits.json", {"train": ["1"], "test": ["2", "3"]})
    for split, name in (("train", "1"), ("test", "2"), ("test", "3")):
        picture(folder / "raw" / "images" / split / name / "image.png")
    shown = told(
        prepare_words("scienceqa", folder / "raw", folder / "out"),
        "'train' and 'test' overlap",
        "1 of the 1 image(s)",
        "2 sample(s) show",
        "1 of the 2",
    )
    assert len((folder / "out" / "test.jsonl").read_text().splitlines()) == 2
    return shown


@attack(LEAK)
def questions_without_images_asked_twice(folder: Path) -> Shown:
    """The same question without an image in train and in val."""
    records = [chat(number, question="What is it?") for number in range(60)]
    return told(
        prepare_words("llava_json", _chats(folder, records), folder / "out", "val_fraction=0.2"),
        "'train' and 'val' overlap",
        "ask what a sample of 'train' asks",
    )


def _viz(image: str) -> dict[str, Any]:
    answers = [{"answer": "red", "answer_confidence": "yes"}] * 10
    return {"image": image, "question": "What?", "answers": answers, "answer_type": "other", "answerable": 1}


@attack(LEAK)
def vizwiz_selected_by_what_is_reported(folder: Path) -> Shown:
    """VizWiz: what chooses the checkpoint is held out of train.json, what is reported is val.json."""
    for part, count in (("train", 60), ("val", 5)):
        write_json(folder / f"{part}.json", [_viz(f"{number}.png") for number in range(count)])
        for number in range(count):
            picture(folder / part / f"{number}.png", (number, 0, 0 if part == "train" else 255))
    counts = prepare("vizwiz", folder, folder / "out", {"val_fraction": 0.2}, workers=1)
    assert counts["test"] == 5 and counts["train"] + counts["val"] == 60
    return _require_apart(folder / "out", "train", "val", "test")


@attack(SMALL)
def fractions_that_are_none(folder: Path) -> Shown:
    """Shares of 1, below 0, of no number, and two that take all."""
    file = _chats(folder, [chat(1), chat(2)])
    for options in (("val_fraction=1",), ("val_fraction=-0.1",), ("test_fraction=nan",), ("val_fraction=inf",)):
        shown = refused(
            prepare_words("llava_json", file, folder / "out", *options),
            options[0].split("=")[0],
            "[0, 1)",
            untouched=folder,
        )
    refused(
        prepare_words("llava_json", file, folder / "out", "val_fraction=0.5", "test_fraction=0.5"),
        "together less than 1",
        untouched=folder,
    )
    return shown


@attack(SMALL)
def a_fraction_that_gives_nothing(folder: Path) -> Shown:
    """Three records about one image, a fifth of which is to be held out."""
    picture(folder / "a.png")
    file = _chats(folder, [_chat_about(number, "a.png") for number in range(3)])
    return refused(
        prepare_words("llava_json", file, folder / "out", "val_fraction=0.2"),
        "3 sample(s) in 1 group(s)",
        "'val'",
        "val_fraction=0",
        untouched=folder,
    )


@attack(SMALL)
def one_record(folder: Path) -> Shown:
    """A file of one record: it is trained on, and that there is nothing to evaluate is told."""
    return told(
        prepare_words("llava_json", _chats(folder, [chat(1)]), folder / "out"),
        "'val_fraction'",
        "no sample to the split 'val'",
        "eval.scorer: null",
    )


@attack(SMALL)
def nothing_left_to_train_on(folder: Path) -> Shown:
    """easy-VQA's layout with five images, of which the default holds out 200."""
    for part in ("train", "test"):
        write_json(folder / part / "questions.json", [["is it red?", "yes", number] for number in range(5)])
        for number in range(5):
            picture(folder / part / "images" / f"{number}.png", (number, 0, 0))
    return refused(
        prepare_words("easyvqa", folder, folder / "out"), "'val_images'", "200", "5 image(s)", untouched=folder
    )


@attack(SMALL)
def more_held_out_than_differ(folder: Path) -> Shown:
    """Flickr30k of six equal photos, two of which are to be val."""
    for number in range(6):
        picture(folder / "images" / f"{number}.png")
    (folder / "results_20130124.token").write_text("".join(f"{number}.png#0\tA photo.\n" for number in range(6)))
    words = prepare_words("flickr30k", folder, folder / "out", "val_images=2", "test_images=1")
    return refused(words, "val_images 2", "of which 1 differ", untouched=folder)


@attack(SMALL)
def chance_that_leaves_a_split_empty(folder: Path) -> Shown:
    """What is right: of twelve photos a tenth and a fifth are held out, whatever their names are; each group stays
    whole, and something is trained on."""
    for first in range(100, 20_000, 199):
        ids = [f"{first + number}" for number in range(12)]
        asked = [
            (name, Sample.from_json(sample(f"{name}-{turn}", images=(f"{name}.png",), question="<image>\nQ?"), ""))
            for name in ids
            for turn in range(2)
        ]
        samples = [RawSample(split="train", sample=one, image_sources=(folder / f"{name}.png",)) for name, one in asked]
        fractions = {"val_fraction": 0.1, "test_fraction": 0.2}
        found = list(drawn("llava_json", lambda samples=samples: samples, fractions, fractions))
        splits = {raw.sample.id.partition("-")[0]: raw.split for raw in found}
        assert set(splits.values()) == {"train", "val", "test"}
        assert all(splits[raw.sample.id.partition("-")[0]] == raw.split for raw in found)
    return right("100 sets of 12 images, none without a split")
