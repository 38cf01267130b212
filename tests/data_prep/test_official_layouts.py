"""Readers of IconQA, Flickr30k, VizWiz and ScienceQA's image questions: small folders in the official layouts, and each
mistake by name."""

import json
import os
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data_prep.prepare import main as prepare_main
from data_prep.prepare import prepare
from data_prep.sources import SOURCES
from data_prep.sources.prompts import check_template, lettered
from vltrain.errors import InputError
from vltrain.evaluate.answering.ranking import to_item
from vltrain.evaluate.samples import read_samples
from vltrain.schema import Sample

DATA = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", Path(__file__).parents[3] / "shared" / "data"))

TXT = {
    "question": "How many?",
    "choices": ["one", "two", "six"],
    "answer": 2,
    "ques_type": "choose_txt",
    "grade": "grade1",
    "label": "A2",
}
IMG = {**TXT, "question": "Which?", "choices": ["choice_0.png", "choice_1.png"], "answer": 1, "ques_type": "choose_img"}
BLANK = {"question": "Take (_).", "answer": "7,364", "ques_type": "fill_in_blank", "grade": "prek", "label": "B1"}


def picture(path: Path) -> Path:
    """One of its own for each name: equal images go into one split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), f"#{zlib.crc32('/'.join(path.parts[-2:]).encode()) & 0xFFFFFF:06x}").save(path)
    return path


def question(root: Path, name: str, record: dict, ques_type: str | None = None) -> None:
    folder = root / (ques_type or record["ques_type"]) / name
    picture(folder / "image.png")
    for choice in record.get("choices") or []:
        if str(choice).endswith(".png"):
            picture(folder / choice)
    (folder / "data.json").write_text(json.dumps(record))


def read(source: str, raw: Path | None, **options) -> dict[str, tuple[str, Sample]]:
    """{id: (split, sample)}"""
    return {raw_sample.sample.id: (raw_sample.split, raw_sample.sample) for raw_sample in SOURCES[source](raw, options)}


def texts(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.turns]


def iconqa(tmp_path: Path, below: str = "") -> Path:
    root = tmp_path / "raw"
    for split, name in (("train", "10"), ("val", "11"), ("test", "9")):
        question(root / below / split, name, TXT)
    question(root / below / "train", "2", IMG)
    question(root / below / "train", "3", BLANK)
    return root


@pytest.mark.parametrize("below", ["", "iconqa", "iconqa_data/iconqa"])
def test_iconqa_in_its_official_layout(tmp_path, below):
    root = iconqa(tmp_path, below)
    skills = dict.fromkeys(("10", "11", "9", "2", "3"), ["counting", "scene"])
    (root / Path(below).parent / "pid2skills.json").write_text(json.dumps(skills))
    found = read("iconqa", root)
    assert {pid: split for pid, (split, _) in found.items()} == {
        "10": "train",
        "11": "val",
        "9": "test",
        "2": "train",
        "3": "train",
    }
    choose_txt, choose_img, blank = (found[pid][1] for pid in ("10", "2", "3"))
    assert texts(choose_txt) == [
        "<image>\nQuestion: How many? Options: (a) one (b) two (c) six. Short answer:",
        "(c) six",
    ]
    assert choose_txt.metadata == {
        "question_type": "choose_txt",
        "choices": ["one", "two", "six"],
        "answer": 2,
        "candidates": ["(a) one", "(b) two", "(c) six"],
        "grade": "grade1",
        "label": "A2",
        "skills": ["counting", "scene"],
    }
    assert texts(choose_img) == ["<image>\nQuestion: Which? Options: (a) <image> (b) <image>. Short answer:", "(b)"]
    assert choose_img.images == tuple(f"train/choose_img/2/{name}.png" for name in ("image", "choice_0", "choice_1"))
    assert (
        texts(blank) == ["<image>\nQuestion: Take (_). Short answer:", "7,364"] and blank.metadata["candidates"] == []
    )


def test_iconqa_of_chosen_types_with_prompts_of_ones_own(tmp_path):
    prompts = {"prompt": "{options}? {question}", "open_prompt": "{question}"}
    found = read("iconqa", iconqa(tmp_path), ques_types="choose_txt,fill_in_blank", **prompts)
    assert set(found) == {"10", "11", "9", "3"}
    assert (
        texts(found["10"][1])[0] == "<image>\n(a) one (b) two (c) six? How many?"
        and texts(found["3"][1])[0] == "<image>\nTake (_)."
    )
    assert set(read("iconqa", iconqa(tmp_path), ques_types=["choose_img"])) == {"2"}


def test_iconqa_without_split_folders_goes_by_pid_splits(tmp_path):
    for name in ("1", "2", "3"):
        question(tmp_path, name, TXT)
    lists = {"choose_txt_train": ["1"], "choose_txt_trainval": ["1", "2"], "val": ["2"], "choose_txt_test": [3]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(lists))
    assert {pid: split for pid, (split, _) in read("iconqa", tmp_path).items()} == {
        "1": "train",
        "2": "val",
        "3": "test",
    }
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"]}))
    with pytest.raises(InputError, match="pid_splits.json: problem '3' .* in none of its splits"):
        read("iconqa", tmp_path)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "test": ["2", "3"]}))
    with pytest.raises(InputError, match="problem '2' is in both train and test"):
        read("iconqa", tmp_path)


def test_iconqa_without_any_splits_is_held_out_by_a_hash(tmp_path):
    for number in range(60):
        question(tmp_path, str(number), TXT)
    found = {pid: split for pid, (split, _) in read("iconqa", tmp_path).items()}
    assert found == {pid: split for pid, (split, _) in read("iconqa", tmp_path).items()} and set(found.values()) == {
        "train",
        "val",
        "test",
    }
    more = {pid: split for pid, (split, _) in read("iconqa", tmp_path, val_fraction="0.5", test_fraction=0.3).items()}
    assert 15 <= list(more.values()).count("val") <= 45 and all(
        more[pid] == "val" for pid, split in found.items() if split == "val"
    )


def test_iconqa_reads_problems_json_where_folders_have_no_data_json(tmp_path):
    root = iconqa(tmp_path, "iconqa")
    (root / "iconqa" / "train" / "choose_txt" / "10" / "data.json").unlink()
    with pytest.raises(InputError, match="problem '10': no such file, and no problems.json"):
        read("iconqa", root)
    (root / "problems.json").write_text(json.dumps({"10": {**TXT, "question": "From problems?"}}))
    assert "From problems?" in texts(read("iconqa", root)["10"][1])[0]


def test_iconqas_own_text_cannot_be_taken_for_an_image(tmp_path):
    question(
        tmp_path / "train", "1", {**TXT, "question": "An <image>?", "choices": ["<image>", "{options}"], "answer": 0}
    )
    prompt, answer = texts(read("iconqa", tmp_path)["1"][1])
    assert (prompt, answer) == (
        "<image>\nQuestion: An <\\image>? Options: (a) <\\image> (b) {options}. Short answer:",
        "(a) <\\image>",
    )


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({**TXT, "ques_type": "choose_text"}, "ques_type: unknown 'choose_text', did you mean 'choose_txt'"),
        ({**TXT, "ques_type": "choose_img"}, "ques_type: found 'choose_img' in a folder of 'choose_txt'"),
        ({**TXT, "choices": []}, "choices: found 0, expected 2 to 26"),
        ({**TXT, "choices": None}, "choices: found null, expected a list"),
        ({**TXT, "choices": ["one", 2, "six"]}, "choices[1]: found 2"),
        ({**TXT, "choices": ["one", " ", "six"]}, "choices[1]: found \" \""),
        ({**TXT, "answer": 3}, "answer: found 3, expected 0 to 2"),
        ({**TXT, "answer": -1}, "answer: found -1"),
        ({**TXT, "answer": True}, "answer: found true"),
        ({**TXT, "answer": "2"}, "answer: found \"2\", expected a whole number"),
        ({**TXT, "question": ""}, "question: found \"\", expected a text that is not empty"),
        ({key: value for key, value in TXT.items() if key != "grade"}, "grade: found nothing"),
        ({**TXT, "label": 5}, "label: found 5"),
        ([], "expected an object"),
    ],
)  # fmt: skip
def test_iconqa_mistakes_name_file_pid_and_key(tmp_path, capsys, record, named):
    question(tmp_path / "raw" / "train", "1", TXT)
    (tmp_path / "raw" / "train" / "choose_txt" / "1" / "data.json").write_text(json.dumps(record))
    assert (
        prepare_main(["--source", "iconqa", "--input", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]) == 2
    )
    said = capsys.readouterr().err
    assert "choose_txt/1/data.json: problem '1': " in said and named in said and not (tmp_path / "out").exists()


def test_more_iconqa_mistakes(tmp_path):
    with pytest.raises(InputError, match="expected SPLIT/QUESTION_TYPE/PID/data.json"):
        read("iconqa", tmp_path)
    question(tmp_path / "train", "1", TXT)
    for options, named in (
        ({"val_fraction": 0.2}, "'val_fraction': has no effect"),
        ({"ques_types": "choose_txt,blank"}, "unknown 'blank'"),
        ({"prompt": "{question}"}, "'prompt': found '{question}', expected each of {question}, {options} once"),
        ({"prompts": "x"}, "did you mean 'prompt'"),
        ({"val_fraction": "much"}, "found 'much', expected float"),
    ):
        with pytest.raises(InputError) as caught:
            read("iconqa", tmp_path, **options)
        assert named in str(caught.value)
    question(tmp_path / "train", "2", TXT, ques_type="choose_text")
    with pytest.raises(InputError, match="choose_text: unknown question type 'choose_text', did you mean 'choose_txt'"):
        read("iconqa", tmp_path)
    with pytest.raises(InputError, match="together less than 1"):
        read("iconqa", tmp_path, val_fraction=0.6, test_fraction=0.4)


@pytest.mark.skipif(not (DATA / "iconqa_mini").is_dir(), reason=f"no IconQA sample at {DATA} (set VLTRAIN_SAMPLE_DATA)")
def test_real_iconqa_becomes_samples_that_can_be_ranked(tmp_path):
    counts = prepare("iconqa", DATA / "iconqa_mini", tmp_path / "out", workers=1)
    assert sum(counts.values()) == 150 and set(counts) == {"train", "val", "test"}
    samples = [sample for split in counts for sample in read_samples(tmp_path / "out" / f"{split}.jsonl")]
    for sample in samples:
        raw = DATA / "iconqa_mini" / sample.metadata["question_type"] / sample.id
        record = json.loads((raw / "data.json").read_text())
        assert record["question"] in sample.turns[0].text and len(sample.images) == len(list(raw.glob("*.png")))
        if record["ques_type"] == "fill_in_blank":
            assert sample.turns[-1].text == record["answer"]
            continue
        item = to_item(sample, "x")
        assert item.whole and len(item.candidates) == len(record["choices"])
        if record["ques_type"] == "choose_txt":
            assert sample.turns[-1].text.endswith(f") {record['choices'][record['answer']]}")


def flickr(folder: Path, num_images: int = 4) -> Path:
    lines = [f"{name}.jpg#{place}\tCaption {place} of {name} ." for name in range(num_images) for place in range(5)]
    folder.mkdir()
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n")
    for name in range(num_images):
        picture(folder / "flickr30k-images" / f"{name}.jpg")
    return folder


def karpathy(name: str, split: str, *captions: str) -> dict:
    return {
        "filename": name,
        "split": split,
        "imgid": 0,
        "sentences": [{"raw": caption, "tokens": []} for caption in captions],
    }


def test_flickr30k_holds_out_whole_images(tmp_path):
    found = read("flickr30k", flickr(tmp_path / "raw", 12), val_images=3, test_images="2")
    splits = {split: [sample for of, sample in found.values() if of == split] for split in ("train", "val", "test")}
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 7 * 5, "val": 3, "test": 2}
    held_out = {sample.images for sample in splits["val"] + splits["test"]}
    assert len(held_out) == 5 and not held_out & {sample.images for sample in splits["train"]}
    sample = splits["val"][0]
    captions = sample.metadata["captions"]
    assert texts(sample) == ["<image>\nA short image description:", captions[0]] and len(captions) == 5
    assert len({sample.turns[-1].text for sample in splits["train"]}) == 35
    first = read("flickr30k", tmp_path / "raw", val_images=3, test_images=2, train_captions="first")
    assert sum(split == "train" for split, _ in first.values()) == 7


def test_flickr30k_with_karpathys_splits(tmp_path):
    raw = flickr(tmp_path / "raw")
    images = [
        karpathy("0.jpg", "train", "One.", "Two."),
        karpathy("1.jpg", "val", "Three."),
        karpathy("2.jpg", "test", "Four.", "Five."),
    ]
    (raw / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    found = read("flickr30k", raw)
    assert {name: split for name, (split, _) in found.items()} == {
        "0.jpg#0": "train",
        "0.jpg#1": "train",
        "1.jpg": "val",
        "2.jpg": "test",
    }
    assert found["2.jpg"][1].metadata["captions"] == ["Four.", "Five."]
    assert prepare("flickr30k", raw, tmp_path / "out") == {"train": 2, "val": 1, "test": 1}
    with pytest.raises(InputError, match="'val_images': has no effect"):
        read("flickr30k", raw, val_images=1)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("0.jpg#0 no tab", "results_20130124.token:1: found '0.jpg#0 no tab'"),
        ("0.jpg#0\tfine\n0.jpg\tno number", "token:2:"),
        ("0.jpg#0\t ", "token:1:"),
        ("0.jpg#0\tone image", "val_images 1000 and test_images 1000 of 1 images"),
        (
            {"images": [karpathy("0.jpg", "trian", "x")]},
            "dataset_flickr30k.json: image 0 ('0.jpg'): split: found 'trian'",
        ),
        ({"images": [karpathy("0.jpg", "train")]}, "image 0 ('0.jpg'): sentences: found none"),
        ({"images": [karpathy("0.jpg", "train", "")]}, 'raw: found ""'),
        ({"images": [{"split": "train"}]}, "image 0: filename: found nothing"),
        ({"image": []}, "images: found nothing"),
    ],
)
def test_flickr30k_mistakes_are_named(tmp_path, content, named):
    raw = flickr(tmp_path / "raw")
    file = "results_20130124.token" if isinstance(content, str) else "dataset_flickr30k.json"
    (raw / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        read("flickr30k", raw)
    assert named in str(caught.value)
    with pytest.raises(InputError, match="no folder of images"):
        read("flickr30k", tmp_path)


def photo(said: list[str], **changes) -> dict:
    given = [{"answer": answer, "answer_confidence": "yes"} for answer in said]
    return {
        "image": "p.jpg",
        "question": "What is this?",
        "answers": given,
        "answer_type": "other",
        "answerable": 1,
        **changes,
    }


def vizwiz(folder: Path, records: list, split: str = "train", annotations: str = "") -> Path:
    (folder / annotations).mkdir(parents=True, exist_ok=True)
    (folder / annotations / f"{split}.json").write_text(json.dumps(records))
    picture(folder / split / "p.jpg")
    return folder


def test_vizwiz_learns_what_most_people_say(tmp_path, capsys):
    raw = vizwiz(
        tmp_path / "raw",
        [photo(["cup", "mug", "mug", "", "cup", "tea", "a", "b", "c", "d"])],
        annotations="Annotations",
    )
    vizwiz(
        raw, [photo(["unanswerable"] * 10, answerable=0, answer_type="unanswerable")], "val", annotations="Annotations"
    )
    (raw / "Annotations" / "test.json").write_text("[]")
    found = read("vizwiz", raw)
    assert "test.json: left out, it has no answers" in capsys.readouterr().out
    split, sample = found["train/0"]
    assert split == "train" and len(sample.metadata["answers"]) == 10
    assert texts(sample) == ["<image>\nQuestion: What is this? Short answer:", "cup"]
    assert found["val/0"][0] == "test" and found["val/0"][1].metadata == {
        "answer": "unanswerable", "answers": ["unanswerable"] * 10, "answer_type": "unanswerable", "answerable": 0,
    }  # fmt: skip
    assert prepare("vizwiz", raw, tmp_path / "out") == {"train": 1, "test": 1}


def test_vizwiz_options(tmp_path):
    records = [photo(["mug", "cup", "cup"]), photo(["unanswerable"], answerable=0)]
    raw = vizwiz(vizwiz(tmp_path, records), records, "val")
    assert read("vizwiz", raw, target="first")["train/0"][1].turns[-1].text == "mug"
    assert set(read("vizwiz", raw, unanswerable="drop")) == {"train/0", "val/0", "val/1"}
    with pytest.raises(InputError, match="option 'target': unknown 'most'"):
        read("vizwiz", raw, target="most")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (photo([]), "question 0 ('p.jpg'): answers: found 0 without a text"),
        (photo(["", " "]), "answers: found 2 without a text"),
        (
            photo(["x"], answers=[{"answer": "x", "answer_confidence": "sure"}]),
            "answers[0]: answer_confidence: found 'sure'",
        ),
        (photo(["x"], answers=[{"answer_confidence": "yes"}]), "answers[0]: answer: found null"),
        (photo(["x"], answers="x"), 'answers: found "x", expected a list'),
        (photo(["x"], answerable=2), "answerable: found 2"),
        (photo(["x"], answer_type=None), "answer_type: found null"),
        (photo(["x"], question=" "), 'question: found " "'),
        (photo(["x"], image=None), "question 0: image: found null"),
        ("x", "expected an object"),
    ],
)
def test_vizwiz_mistakes_name_file_number_image_and_key(tmp_path, record, named):
    with pytest.raises(InputError) as caught:
        read("vizwiz", vizwiz(tmp_path, [record]))
    assert "train.json: question 0" in str(caught.value) and named in str(caught.value)


def test_vizwiz_needs_its_files(tmp_path):
    with pytest.raises(InputError, match="neither train.json nor val.json"):
        read("vizwiz", tmp_path)
    with pytest.raises(InputError, match="expected a list"):
        read("vizwiz", vizwiz(tmp_path, {}))  # type: ignore[arg-type]


SCIENCE = {
    "question": "Q?",
    "choices": ["x", "y"],
    "answer": 1,
    "hint": "H",
    "image": "image.png",
    "grade": "grade2",
    "subject": "s",
    "lecture": "LL",
    "solution": "EE",
    "skill": "look",
}


def scienceqa(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    problems = {"7": {**SCIENCE, **changes}, "8": {**SCIENCE, "image": None}}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["7", "8"]}))
    picture(folder / "images" / "train" / "7" / "image.png")
    return folder


def test_scienceqas_image_questions_as_instructblip_is_asked(tmp_path):
    found = read("scienceqa_image", scienceqa(tmp_path))
    assert set(found) == {"7"}
    sample = found["7"][1]
    assert texts(sample) == ["<image>\nContext: H LL Question: Q? Options: (a) x (b) y Answer:", "(b) y"]
    assert (sample.metadata["candidates"], sample.metadata["skill"]) == (["(a) x", "(b) y"], "look")
    empty = read("scienceqa_image", scienceqa(tmp_path, hint=" ", lecture=""))["7"][1]
    assert empty.turns[0].text.startswith("<image>\nContext: N/A Question:")
    with pytest.raises(InputError, match="problem '7': answer: found 5"):
        read("scienceqa_image", scienceqa(tmp_path, answer=5))


@pytest.mark.parametrize(
    ("prompt_format", "whole"),
    [("QCM-A", True), ("QCM-ALE", False), ("CQM-AE", False), ("QCM-LEA", None), ("QCM-LE", None)],
)
def test_scienceqas_answers_can_be_ranked_where_they_begin_with_the_letter(tmp_path, prompt_format, whole):
    sample = read("scienceqa", scienceqa(tmp_path), prompt_format=prompt_format)["7"][1]
    if whole is None:
        assert "candidates" not in sample.metadata
        return
    item = to_item(sample, "x")
    assert item.candidates == ("The answer is A.", "The answer is B.") and item.whole is whole


@pytest.mark.skipif(
    not (DATA / "scienceqa_mini").is_dir(), reason=f"no ScienceQA sample at {DATA} (set VLTRAIN_SAMPLE_DATA)"
)
def test_real_scienceqa_image_questions(tmp_path):
    assert prepare("scienceqa_image", DATA / "scienceqa_mini", tmp_path / "out", {"missing_images": "drop"}) == {
        "test": 24
    }


@pytest.mark.parametrize(
    ("template", "fine"),
    [
        ("{question} x {options}", True),
        ("{question}", False),
        ("{question}{options}{hint}", False),
        ("{question!r}{options}", False),
        ("{question}{options}{options}", False),
        ("{question}{options", False),
        ("{question} {options} {{a}}", True),
    ],
)
def test_templates(template, fine):
    if fine:
        return check_template("s", "prompt", template, ("question", "options"))
    with pytest.raises(InputError, match="source 's', option 'prompt': found"):
        check_template("s", "prompt", template, ("question", "options"))


def test_letters():
    assert lettered(["x ", "<image>", ""]) == ["(a) x", "(b) <image>", "(c)"]
