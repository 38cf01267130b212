"""Chats of LLaVA's form, markers of images in texts, and files of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.attacks.attack import Shown, attack, refused, refuses, right, told
from tests.attacks.inputs import TOKENIZER, chat, picture, prepare_words, sample, write_json, write_jsonl
from tests.attacks.readers import ELEMENTS, PROBLEM, expect, prepared, scienceqa, talks
from vltrain.data.text.conversation import encode_sample
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.evaluate.predictions import read_predictions
from vltrain.evaluate.samples import read_samples

ANSWERS = "files of answers"

MARKERS = "`<image>` as a text"

CHATS = "LLaVA's files as they are"


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
