"""Attacks on what is read: JSON and JSON Lines, samples, data sets, LLaVA's conversations, and files of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.tokens import tokenised
from tests.attacks.attack import AttackFailed, Shown, attack, refused, refuses, right, told
from tests.attacks.inputs import TOKENIZER, chat, pack_words, picture, prepare_words, sample, write_json, write_jsonl
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.evaluate.predictions import read_predictions
from vltrain.evaluate.report import score_samples, write_report
from vltrain.evaluate.samples import read_samples
from vltrain.schema import Sample, Turn
from vltrain.train.zero.ds_config import load_ds_json

NO_TEXT = "JSON values that are no text"
ELEMENTS = "elements of a list that nobody looks at"
EVERY_TURN = "a check on the last turn only"
OWN_FILES = "files of our own that we cannot read back"
ONE_ANSWER = "two readers of one format"
NO_FILE = "what is no plain file"
PROBLEM = {
    "question": "q?",
    "choices": ["x", "y"],
    "answer": 1,
    "hint": "",
    "image": None,
    "grade": "grade2",
    "subject": "natural science",
    "lecture": "",
    "solution": "",
}


def packed(folder: Path, *records: Any, **changed: Any) -> list[Any]:
    """The words of `vltrain pack` over these samples."""
    return pack_words(write_jsonl(folder / "s.jsonl", records or [sample(**changed)]), folder / "packs")


def talks(folder: Path, *records: Any) -> list[Any]:
    """The words of `vltrain prepare` over LLaVA's records, all of which are trained on."""
    return prepare_words(
        "llava_json", write_json(folder / "chats.json", list(records)), folder / "out", "val_fraction=0"
    )


def prepared(folder: Path, words: list[Any], *needles: str) -> list[dict[str, Any]]:
    """The samples that these words make, told with the needles."""
    told(words, *needles)
    return [
        json.loads(line) for line in (folder / "out" / "train.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]


def expect(found: Any, wanted: Any) -> None:
    if found != wanted:
        raise AttackFailed("silent", f"found {found!r:.200}, expected {wanted!r:.200}")


def scienceqa(folder: Path, source: str = "scienceqa", **changed: Any) -> list[Any]:
    write_json(folder / "raw" / "problems.json", {"1": {**PROBLEM, **changed}})
    write_json(folder / "raw" / "pid_splits.json", {"train": ["1"]})
    return prepare_words(source, folder / "raw", folder / "out")


@attack(NO_TEXT)
def null_answer(folder: Path) -> Shown:
    """An answer that is null."""
    return refused(
        packed(folder, answer=None), "s.jsonl:1", "turns[1].text: found null, expected a text", untouched=folder
    )


@attack(NO_TEXT)
def parts_as_text(folder: Path) -> Shown:
    """Content parts, as chats have them, in a line of samples."""
    return refused(
        packed(folder, sample(), sample(2, question=[{"type": "text", "text": "Q?"}])),
        "s.jsonl:2",
        "turns[0].text: found [",
    )


@attack(NO_TEXT)
def number_as_id(folder: Path) -> Shown:
    """A sample whose id is a number."""
    return refused(packed(folder, sample(id=7)), "id: found 7, expected a text")


@attack(NO_TEXT)
def true_in_a_later_turn(folder: Path) -> Shown:
    """`true` as the third turn of four."""
    turns = [{"role": ("user", "assistant")[number % 2], "text": True if number == 2 else "x"} for number in range(4)]
    return refused(packed(folder, sample(turns=turns)), "turns[2].text: found true")


@attack(NO_TEXT)
def turn_of_nobody(folder: Path) -> Shown:
    """A turn whose role is null."""
    return refused(
        packed(folder, sample(turns=[{"role": None, "text": "Q?"}, {"role": "assistant", "text": "x"}])),
        "turns[0].role: found null",
    )


@attack(NO_TEXT)
def null_metadata(folder: Path) -> Shown:
    """Metadata that is null, and a list of pairs, which dict() would take."""
    refused(packed(folder, sample(metadata=None)), "metadata: found null, expected an object")
    return refused(
        packed(folder, sample(metadata=[["answer", "x"]])), 'metadata: found [["answer", "x"]], expected an object'
    )


@attack(NO_TEXT)
def misspelt_key(folder: Path) -> Shown:
    """A sample with `image` where `images` is meant: without a marker nobody would miss it."""
    return refused(packed(folder, sample(image="a.png")), "found the key 'image'; did you mean 'images'?")


@attack(NO_TEXT)
def chat_of_an_object(folder: Path) -> Shown:
    """An object as an answer of a chat."""
    return refused(
        talks(folder, chat(1), chat(2, answer={"text": "yes"})),
        "record 1: conversations[1].value: found {",
        untouched=folder / "none",
    )


@attack(NO_TEXT)
def chat_with_id_true(folder: Path) -> Shown:
    """A chat whose id is `true`, and one whose id is a list."""
    refused(talks(folder, chat([1])), "id: found [1], expected an id")
    return refused(
        talks(folder, chat(True)), "id: found true, expected an id: a text that is not empty, or a whole number"
    )


@attack(NO_TEXT)
def null_caption(folder: Path) -> Shown:
    """A caption that is null in Flickr30k's file of splits."""
    (folder / "raw" / "images").mkdir(parents=True)
    write_json(
        folder / "raw" / "dataset_flickr30k.json",
        {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}, {"raw": None}]}]},
    )
    return refused(prepare_words("flickr30k", folder / "raw", folder / "out"), "image 0 ('a.jpg'): raw: found null")


@attack(ELEMENTS)
def numbers_as_choices(folder: Path) -> Shown:
    """Choices that are numbers, of ScienceQA and of its image questions."""
    refused(scienceqa(folder, choices=["x", 2]), "problem '1': choices[1]: found 2, expected a text")
    return refused(
        scienceqa(folder, "scienceqa_image", choices=[1, 2], image="image.png"),
        "problem '1': choices[0]: found 1, expected a text",
    )


@attack(ELEMENTS)
def nested_choices(folder: Path) -> Shown:
    """A list as a choice, which prints as one."""
    return refused(scienceqa(folder, choices=["x", ["y"]]), 'choices[1]: found ["y"], expected a text')


@attack(ELEMENTS)
def image_that_is_zero(folder: Path) -> Shown:
    """An image that is 0: no image by its truth, and no file name by its type."""
    return refused(scienceqa(folder, image=0), "problem '1': image: found 0, expected a text")


@attack(ELEMENTS)
def skills_that_are_numbers(folder: Path) -> Shown:
    """IconQA's skills of a question, one of them a number."""
    question = {
        "question": "q?",
        "choices": ["a", "b"],
        "answer": 0,
        "ques_type": "choose_txt",
        "grade": "g",
        "label": "A",
    }
    place = folder / "raw" / "train" / "choose_txt" / "1"
    write_json(place / "data.json", question)
    picture(place / "image.png")
    write_json(folder / "raw" / "pid2skills.json", {"1": ["counting", 3]})
    return refused(
        prepare_words("iconqa", folder / "raw", folder / "out"), "pid2skills.json", "[1]: found 3, expected a text"
    )


@attack(ELEMENTS)
def images_that_are_null(folder: Path) -> Shown:
    """A null in a list of images, of a sample and of a chat."""
    refused(packed(folder, sample(question="<image> <image>", images=["a.png", None])), "images[1]: found null")
    return refused(
        talks(folder, chat(1, question="<image>", image=[None])), "image[0]: found null, expected a file's name"
    )


@attack(ELEMENTS)
def numbers_among_ten_answers(folder: Path) -> Shown:
    """A number among VizWiz's ten answers."""
    answers = [{"answer": text, "answer_confidence": "yes"} for text in ("red", 7)]
    write_json(
        folder / "raw" / "train.json",
        [{"image": "a.jpg", "question": "q?", "answers": answers, "answer_type": "other", "answerable": 1}],
    )
    return refused(
        prepare_words("vizwiz", folder / "raw", folder / "out"), "answers[1]: answer: found 7, expected a text"
    )


def four(second: str, third: str = "Two?") -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[number % 2], "text": text}
        for number, text in enumerate(("One?", second, third, "yes"))
    ]


@attack(EVERY_TURN)
def empty_first_answer(folder: Path) -> Shown:
    """An empty answer in the middle of a conversation: the model would learn to end at once."""
    return refused(packed(folder, sample(turns=four(""))), "turn 1 is an empty answer")


@attack(EVERY_TURN)
def blank_first_answer(folder: Path) -> Shown:
    """One of spaces, a line end and a line separator only."""
    return refused(packed(folder, sample(turns=four(" \n\u2028\u00a0"))), "turn 1 is an empty answer")


@attack(EVERY_TURN)
def empty_question(folder: Path) -> Shown:
    """An empty question, first and in the middle."""
    refused(packed(folder, sample(question=" ")), "turn 0 is an empty user turn")
    return refused(
        packed(folder, sample(turns=four("yes", ""))), "turn 2 is an empty user turn, expected a text or <image>"
    )


@attack(EVERY_TURN)
def empty_answer_of_a_chat(folder: Path) -> Shown:
    """An empty answer in the middle of one of LLaVA's conversations."""
    talk = [
        {"from": ("human", "gpt")[number % 2], "value": text}
        for number, text in enumerate(("One?", "\t", "Two?", "yes"))
    ]
    return refused(talks(folder, chat(1, conversations=talk)), "record 0", "turn 1 is an empty answer")


@attack(EVERY_TURN)
def marker_in_an_early_answer(folder: Path) -> Shown:
    """An image marker in an answer that is not the last."""
    return refused(packed(folder, sample(turns=four("see <image>"))), "<image> in an assistant turn", "<\\image>")


SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"


@attack(OWN_FILES)
def separators_in_samples(folder: Path) -> Shown:
    """All that `str.splitlines` takes for line ends, in question, answer, id and metadata: prepared, packed and read
    for evaluation."""
    talk = chat(f"id {SEPARATORS}", question=f"q {SEPARATORS} q", answer=f"a {SEPARATORS} a")
    (made,) = prepared(folder, talks(folder, talk), "1 samples")
    told(pack_words(folder / "out" / "train.jsonl", folder / "packs", pack_length=256), "1 samples")
    (read,) = read_samples(folder / "out" / "train.jsonl")
    expect(
        (read.id, read.turns[1].text, made["metadata"]["answer"]),
        (talk["id"], f"a {SEPARATORS} a", f"a {SEPARATORS} a"),
    )
    return right("every reader gives back what was written")


@attack(OWN_FILES)
def separators_in_predictions(folder: Path) -> Shown:
    """The same in an answer that a model gave: `predictions.jsonl` is read back, by its scorer too."""
    asked = [Sample(id=f"1{SEPARATORS}", turns=(Turn(role="user", text="q"), Turn(role="assistant", text="a")))]
    write_report(score_samples("exact", asked, [f"one{SEPARATORS}two"], "x"), folder, {})
    expect(read_predictions(folder / "predictions.jsonl"), {f"1{SEPARATORS}": f"one{SEPARATORS}two"})
    return right("predictions.jsonl gives back ids and answers")


@attack(OWN_FILES)
def separators_packed_in_parts(folder: Path) -> Shown:
    """The same in ids and image names of samples that are packed in parts, whose lists the merge reads."""
    picture(folder / f"a{chr(0x2028)}.png")
    samples = write_jsonl(
        folder / "s.jsonl", [sample(f"1{SEPARATORS}", question="<image>", images=[f"a{chr(0x2028)}.png"]), sample(2)]
    )
    for part in (1, 2):
        told(pack_words(samples, folder / "packs", "--parts", 2, "--part", part), f"part {part} of 2 is done")
    return told(pack_words(samples, folder / "packs", "--parts", 2, "--merge"), "2 samples, 1 images")


def readers_of_lines(folder: Path, content: bytes) -> list[Callable[[], Any]]:
    """Whoever reads a samples file: packing, evaluation; and whoever reads JSON and answers."""
    (folder / "x.jsonl").write_bytes(content)
    encoder = TemplateEncoder(load_tokenizer(TOKENIZER), "mmt", 4)
    return [
        lambda: list(tokenised(folder / "x.jsonl", encoder, 50_000_000, 1)), lambda: read_samples(folder / "x.jsonl"),
        lambda: read_predictions(folder / "x.jsonl"), lambda: load_ds_json(folder / "x.jsonl"),
    ]  # fmt: skip


LINE = {**sample(), "prediction": "x"}  # of no use to anybody, but JSON


def same_refusal(folder: Path, content: bytes, needle: str) -> Shown:
    return [refuses(read, needle) for read in readers_of_lines(folder, content)][-1]


@attack(ONE_ANSWER)
def byte_order_mark(folder: Path) -> Shown:
    """A byte order mark in front of samples, answers and DeepSpeed's JSON, as Windows' editors write it."""
    line = b"\xef\xbb\xbf" + json.dumps(sample()).encode() + b"\n"
    pack, evaluation, *_ = readers_of_lines(folder, line)
    expect((len(pack()[0].ids), [one.id for one in evaluation()]), (1, ["1"]))
    (folder / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "prediction": "x"}\n')
    (folder / "ds.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 2}}')
    expect(
        (read_predictions(folder / "p.jsonl"), load_ds_json(folder / "ds.json")),
        ({"1": "x"}, {"zero_optimization": {"stage": 2}}),
    )
    return right("taken by every reader")


@attack(ONE_ANSWER)
def mark_in_the_middle(folder: Path) -> Shown:
    """Two files with marks put one behind the other."""
    line = b"\xef\xbb\xbf" + json.dumps(sample()).encode() + b"\n"
    pack, evaluation, *_ = readers_of_lines(folder, line + line.replace(b'"1"', b'"2"'))
    return [refuses(read, "x.jsonl:2:1", "\\ufeff") for read in (pack, evaluation)][-1]


@attack(ONE_ANSWER)
def key_twice(folder: Path) -> Shown:
    """A key that stands twice, once spelled with an escape."""
    line = json.dumps(LINE)[:-1] + ', "\\u0069d": "2"}'
    return same_refusal(folder, line.encode(), "the key 'id' a second time")


@attack(ONE_ANSWER)
def not_a_number(folder: Path) -> Shown:
    """NaN, deep in the metadata; and a number that becomes infinite."""
    same_refusal(
        folder,
        json.dumps({**LINE, "metadata": {"a": [1e400]}}).replace("Infinity", "1e400").encode(),
        "1e400, which is too large",
    )
    return same_refusal(
        folder, json.dumps({**LINE, "metadata": {"a": [float("nan")]}}).encode(), "found NaN, which JSON does not have"
    )


@attack(ONE_ANSWER)
def half_of_a_character(folder: Path) -> Shown:
    """A lone surrogate, which JSON can spell and no file can hold."""
    return same_refusal(folder, json.dumps({**LINE, "metadata": {"a": "x\ud800"}}).encode(), "half of a character")


@attack(ONE_ANSWER)
def deep_nesting(folder: Path) -> Shown:
    """Nesting that a parser's stack takes and a writer's does not."""
    same_refusal(
        folder,
        json.dumps({**LINE, "metadata": {"a": 0}}).replace("0", "[" * 100 + "]" * 100).encode(),
        "nested too deeply",
    )
    return same_refusal(folder, b'{"a":' * 50_000, "nested too deeply")


@attack(ONE_ANSWER)
def utf_16(folder: Path) -> Shown:
    """UTF-16, which Python's json recognises in bytes and not in a text."""
    return same_refusal(folder, json.dumps(LINE).encode("utf-16"), "not UTF-8")


@attack(ONE_ANSWER)
def blank_lines(folder: Path) -> Shown:
    """Blank lines and Windows' line ends between samples."""
    lines = b"\r\n \t\r\n" + json.dumps(sample()).encode() + b"\r\n\r\n" + json.dumps(sample(2)).encode()
    pack, evaluation, *_ = readers_of_lines(folder, lines)
    expect((pack()[0].ids, [one.id for one in evaluation()]), (["1", "2"], ["1", "2"]))
    return right("skipped by every reader")


@attack(NO_FILE)
def pipe_of_samples(folder: Path) -> Shown:
    """A named pipe in the place of a samples file, of chats, and of answers: nothing may wait for it."""
    os.mkfifo(folder / "pipe.jsonl")
    refused(prepare_words("llava_json", folder / "pipe.jsonl", folder / "out"), "not a regular file")
    refused(
        ["evaluate", "--predictions", folder / "pipe.jsonl", "--data", folder / "pipe.jsonl", "--eval.scorer", "exact"],
        "not a regular file",
    )
    return refused(pack_words(folder / "pipe.jsonl", folder / "packs"), "not a regular file", untouched=folder)


@attack(NO_FILE)
def pipe_as_recipe(folder: Path) -> Shown:
    """A named pipe in the place of a recipe."""
    os.mkfifo(folder / "recipe.yaml")
    return refused(["plan", folder / "recipe.yaml"], "not a regular file, expected a YAML recipe")


@attack(NO_FILE)
def device_as_json(folder: Path) -> Shown:
    """A link to /dev/zero in the place of DeepSpeed's JSON."""
    (folder / "ds.json").symlink_to("/dev/zero")
    return refuses(lambda: load_ds_json(folder / "ds.json"), "not a regular file")
