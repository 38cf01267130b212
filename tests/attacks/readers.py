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
from vltrain.data.text.conversation import encode_sample
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
CHATS = "LLaVA's files as they are"
MARKERS = "`<image>` as a text"
ANSWERS = "files of answers"
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
    tokenizer = load_tokenizer(TOKENIZER)
    return [
        lambda: list(tokenised(folder / "x.jsonl", tokenizer, "mmt", 4, 1)), lambda: read_samples(folder / "x.jsonl"),
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


@attack(CHATS)
def repeated_ids(folder: Path) -> Shown:
    """Ids that come again, as in LLaVA's mix, where an image's id stands for each of its conversations; one of them
    looks numbered already."""
    made = prepared(
        folder,
        talks(folder, chat("a"), chat("a#2"), chat("a"), chat("a"), chat(5), chat("5")),
        "3 id(s) that came before are numbered",
    )
    expect([one["id"] for one in made], ["a", "a#2", "a#3", "a#4", "5", "5#2"])
    return right("numbered, each once, and told with a count")


@attack(CHATS)
def missing_ids(folder: Path) -> Shown:
    """Records without an id, and with one that is null."""
    made = prepared(
        folder,
        talks(folder, {"conversations": chat()["conversations"]}, chat(None)),
        "2 record(s) without an id are numbered",
    )
    expect([one["id"] for one in made], ["record-0", "record-1"])
    return right("numbered by their places, and told")


@attack(CHATS)
def assistant_first(folder: Path) -> Shown:
    """A conversation that begins with the assistant and ends with a question, as ShareGPT's do."""
    spoken = [
        {"from": who, "value": text} for who, text in (("gpt", "Hi"), ("human", "Q?"), ("gpt", "A"), ("human", "More?"))
    ]
    made = prepared(folder, talks(folder, chat(1, conversations=spoken)), "1 conversation(s) begin with the assistant")
    expect([turn["text"] for turn in made[0]["turns"]], ["Q?", "A"])
    return right("left out, and told")


@attack(CHATS)
def empty_system_turn(folder: Path) -> Shown:
    """A system turn that says nothing, as conversions leave them."""
    spoken = [{"from": "system", "value": ""}, *chat()["conversations"]]
    made = prepared(folder, talks(folder, chat(1, conversations=spoken)), "1 empty system turn(s) are left out")
    expect([turn["role"] for turn in made[0]["turns"]], ["user", "assistant"])
    return right("left out, and told")


@attack(CHATS)
def messages_with_parts(folder: Path) -> Shown:
    """`messages` with content parts, a system turn and JSON Lines; `<image>` typed beside an image part is text."""
    picture(folder / "a.png")
    parts = [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]
    talk = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "A tag."},
        ],
        "images": "a.png",
    }
    lines = write_jsonl(folder / "chats.jsonl", [talk, chat(2)])
    made = prepared(
        folder, prepare_words("llava_json", lines, folder / "out", "val_fraction=0"), "1 text(s) with <image>"
    )
    expect([turn["text"] for turn in made[0]["turns"]], ["Be brief.", "<image>What is <\\image>?", "A tag."])
    expect((made[0]["images"], made[1]["images"]), (["images/a.png"], []))
    return right("read as they stand, beside a record without image")


@attack(CHATS)
def parts_that_name_their_images(folder: Path) -> Shown:
    """Images named by the content parts themselves; and named twice."""
    for name in ("a.png", "b.png"):
        picture(folder / name)
    content = [
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "text", "text": "\nor\n"},
        {"type": "image", "image": "a.png"},
    ]
    talk = {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        ]
    }
    refused(talks(folder, {**talk, "image": "a.png"}), "images both in content parts and under image")
    made = prepared(folder, talks(folder, talk), "1 samples")
    expect((made[0]["images"], made[0]["turns"][0]["text"]), (["images/b.png", "images/a.png"], "<image>\nor\n<image>"))
    return right("in the order of the parts")


@attack(CHATS)
def images_nowhere_in_the_text(folder: Path) -> Shown:
    """An image that no turn shows, which other readers drop: refused, or put in front where that is asked for."""
    picture(folder / "a.png")
    refused(talks(folder, chat(1, image="a.png")), "1 image(s) and no <image> in its turns", "unmarked=front")
    words = prepare_words("llava_json", folder / "chats.json", folder / "out", "val_fraction=0", "unmarked=front")
    (made,) = prepared(folder, words, "1 record(s) with images and no <image>")
    expect((made["turns"][0]["text"], made["images"]), ("<image>\nQ?", ["images/a.png"]))
    return right("refused, with the option that was then taken and told")


@attack(CHATS)
def image_from_the_net(folder: Path) -> Shown:
    """An image given as an address, and one as base64 text."""
    refused(
        talks(folder, chat(1, question="<image>", image="data:image/png;base64,AAAA")),
        "image: found",
        "download it first",
    )
    return refused(
        talks(folder, chat(1, question="<image>", image="https://example.org/a.png")),
        "expected the path of a file; download it first",
    )


@attack(CHATS)
def videos_and_tools(folder: Path) -> Shown:
    """A video among the parts, and a turn of a tool."""
    talk = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, {"role": "assistant", "content": "x"}]
    refused(talks(folder, {"messages": talk}), 'messages[0].content[0].type: found "video", expected text or image')
    spoken = [*chat()["conversations"], {"from": "tool", "value": "7"}]
    return refused(talks(folder, chat(1, conversations=spoken)), 'conversations[2].from: found "tool"')


@attack(CHATS)
def turn_that_is_not_to_be_learned(folder: Path) -> Shown:
    """A turn with `weight: 0`, by which other trainers leave an answer out of the loss: here it would be learned."""
    spoken = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A", "weight": 0}]
    return refused(talks(folder, chat(1, conversations=spoken)), "conversations[1].weight: found 0")


@attack(CHATS)
def keys_that_are_not_read(folder: Path) -> Shown:
    """Keys that mean nothing here: named with a count, in case one was meant to."""
    return told(
        talks(folder, chat(1, model="", imgae="a.png"), chat(2, model="")),
        "keys that are not read: model (2), imgae (1)",
    )


@attack(CHATS)
def unusable_records(folder: Path) -> Shown:
    """A few broken records in a large file: refused, or left out and named where that is asked for."""
    records = [chat(1), chat(2, answer=""), chat(3, answer=None), {"id": 4}]
    refused(talks(folder, *records), "record 1", "unusable=drop")
    words = prepare_words("llava_json", folder / "chats.json", folder / "out", "val_fraction=0", "unusable=drop")
    expect(len(prepared(folder, words, "3 record(s) left out")), 1)
    return right("three named and counted, one sample made")


@attack(MARKERS)
def marker_in_an_answer(folder: Path) -> Shown:
    """`<image>` typed in an answer of a chat: text, tokenised as such, and no image."""
    made = prepared(
        folder, talks(folder, chat(1, answer="Write <image> there.")), "1 text(s) with <image> in an answer"
    )
    expect(
        (made[0]["turns"][1]["text"], made[0]["metadata"]["answer"]), ("Write <\\image> there.", "Write <image> there.")
    )
    (read,) = read_samples(folder / "out" / "train.jsonl")
    tokenizer = load_tokenizer(TOKENIZER)
    segment = encode_sample(read, tokenizer, "mmt", 4)
    expect(tokenizer.decode(segment.input_ids[segment.loss_mask].tolist()[:-1]).strip(), "Write <image> there.")
    return right("escaped in the sample, and read back as it was typed")


@attack(MARKERS)
def marker_without_image(folder: Path) -> Shown:
    """`<image>` in a question without an image: a forgotten image, or text, which is written with a backslash."""
    refused(
        talks(folder, chat(1, question="What is <image>?")),
        "1 <image> marker(s) in the text but 0 image(s) listed",
        "<\\image>",
    )
    made = prepared(folder, talks(folder, chat(1, question="What is <\\image>?")), "1 samples")
    expect((made[0]["images"], made[0]["turns"][0]["text"]), ([], "What is <\\image>?"))
    return right("refused with the way to write the text")


@attack(MARKERS)
def marker_in_official_files(folder: Path) -> Shown:
    """`<image>` in ScienceQA's own question, choice and solution: it stays what it is, and is no image."""
    changed = {
        "question": "What does <image> do?",
        "choices": ["<image>", "y"],
        "answer": 0,
        "solution": "See <image>.",
    }
    (made,) = prepared(folder, scienceqa(folder, **changed), "1 samples")
    expect(made["images"], [])
    expect(
        made["turns"][0]["text"],
        "Question: What does <\\image> do?\nContext: N/A\nOptions: (A) <\\image> (B) y\nResponse:",
    )
    expect(
        (made["turns"][1]["text"], made["metadata"]["choices"]),
        ("The answer is A. BECAUSE: See <\\image>.", ["<image>", "y"]),
    )
    return right("escaped in the turns, as it is in the metadata")


def answered(folder: Path, content: Any, *more: Any, name: str = "answers.json") -> list[Any]:
    """The words that score a file of answers to two ScienceQA questions, whose right answers are B and A."""
    write_json(folder / "data" / "problems.json", {"1": PROBLEM, "2": {**PROBLEM, "answer": 0}})
    write_json(folder / "data" / "pid_splits.json", {"test": ["1", "2"]})
    file = write_jsonl(folder / name, content) if name.endswith("l") else write_json(folder / name, content)
    return ["evaluate", "--predictions", file, "--data", folder / "data", *more]


@attack(ANSWERS)
def answers_in_another_order(folder: Path) -> Shown:
    """Multimodal-CoT's file, which has no ids, of a split in another order: its labels tell."""
    told(
        answered(
            folder,
            {
                "preds": ["The answer is (B)", "The answer is (A)"],
                "labels": ["The answer is (B).", "The answer is (A)."],
            },
        ),
        "accuracy=1.0000",
    )
    return refused(
        answered(folder, {"preds": ["x", "y"], "labels": ["The answer is (A).", "The answer is (B)."]}),
        "of another split, or in another order",
    )


@attack(ANSWERS)
def letters_unasked(folder: Path) -> Shown:
    """Bare letters, which LLaVA-1.5 answers: failed without --letters, read and told with it."""
    lines = [{"question_id": 1, "text": "B"}, {"question_id": "2", "text": "(a)"}]
    told(answered(folder, lines, name="answers.jsonl"), "accuracy=0.0000 (2 questions) failed=2")
    told(answered(folder, lines, "--letters", name="answers.jsonl"), "accuracy=1.0000")
    return told(answered(folder, lines, "--letters", name="answers.jsonl"), "read as: letters: 2 of 2")


@attack(ANSWERS)
def part_of_a_split(folder: Path) -> Shown:
    """Answers to half of a split: a score that looks like one of the whole."""
    refused(answered(folder, {"1": "The answer is B."}), "has no answer to 1 question(s)", "--allow-missing")
    return told(
        answered(folder, {"1": "The answer is B."}, "--allow-missing"), "accuracy=1.0000 (1 questions)", "missing=1"
    )


@attack(ANSWERS)
def figures_without_answers(folder: Path) -> Shown:
    """Chameleon's result file, which holds an accuracy and no answer."""
    return refused(
        answered(folder, {"acc": 79.9, "correct": 3390, "wrong": 851, "count": 4241, "args": {}}),
        "found figures only",
        "_cache.jsonl",
    )


@attack(ELEMENTS)
def kinds_and_skills_that_are_numbers(folder: Path) -> Shown:
    """Metadata by which columns are named: a kind that is a number, and one among the skills."""
    write_json(folder / "p.json", {"1": "yes"})
    words = ["evaluate", "--predictions", folder / "p.json", "--data", folder / "s.jsonl"]
    write_jsonl(folder / "s.jsonl", [sample(metadata={"kind": 3})])
    refused([*words, "--eval.scorer", "exact"], "kind: found 3, expected a text")
    write_jsonl(folder / "s.jsonl", [sample(metadata={"question_type": "fill_in_blank", "skills": ["counting", 3]})])
    return refused([*words, "--eval.scorer", "iconqa"], "skills: found ['counting', 3]")


@attack(ANSWERS)
def many_ids_and_one_twice(folder: Path) -> Shown:
    """100,000 answers in one object, the last of them to a question answered before: found at once, not by comparing
    all with all."""
    text = json.dumps({str(number): "x" for number in range(100_000)})[:-1] + ', "7": "y"}'
    (folder / "answers.json").write_text(text)
    return refuses(lambda: read_predictions(folder / "answers.json"), "found the key '7' a second time")


@attack(ANSWERS)
def answer_that_is_null(folder: Path) -> Shown:
    """An answer that is null, in lines and in an object."""
    refused(answered(folder, {"outputs": {"1": "x", "2": None}}), "outputs: '2': found null, expected a text")
    return refused(
        answered(folder, [{"question_id": 1, "text": None}], name="answers.jsonl"), "answers.jsonl:1: text: found null"
    )


@attack(CHATS)
def turn_in_both_forms(folder: Path) -> Shown:
    """A turn with `from` and `value` beside `role` and `content` that say something else."""
    turn = {"from": "human", "value": "Q?", "role": "user", "content": "Another?"}
    chats = write_json(folder / "chats.json", [{"id": "1", "conversations": [turn, {"from": "gpt", "value": "yes"}]}])
    return refused(
        prepare_words("llava_json", chats, folder / "out"), "conversations[0]", "say something else", "Another?"
    )


@attack(ANSWERS)
def question_that_a_split_names_twice(folder: Path) -> Shown:
    """pid_splits.json lists a problem twice, and its answer would count twice."""
    words = answered(folder, {"1": "The answer is B."})
    write_json(folder / "data" / "pid_splits.json", {"test": ["1", 1]})
    return refused(words, "pid_splits.json", "names problem '1' twice")


@attack(ELEMENTS)
def choices_of_nobody(folder: Path) -> Shown:
    """A choice that is null, where only letters are judged."""
    words = answered(folder, {"1": "The answer is B.", "2": "The answer is A."})
    write_json(
        folder / "data" / "problems.json", {"1": {**PROBLEM, "choices": ["x", None]}, "2": {**PROBLEM, "answer": 0}}
    )
    return refused(words, "problem '1'", "choices[1]: found null, expected a text")
