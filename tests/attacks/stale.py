"""More attacks on what data is made from: files that belong to two settings, tokenizers that changed behind one
vocabulary, packs replaced in use."""

import contextlib
import json
import logging
import pickle
import shutil
from pathlib import Path

from tests.attacks.attack import Shown, attack, refused, refuses, right, told
from tests.attacks.identity import REBUILT, REUSED, changing, chats, made, packs, recipe, refuses_to_use
from tests.attacks.inputs import pack_words, picture, prepare_words, sample, write_json, write_jsonl
from tests.attacks.tokens import STATE, fast
from tests.support.vocabularies import CHATML, make_bert
from vltrain.data.origin import read_made_from, rendered_digest, tokenizer_changes
from vltrain.data.shards import PackedDataset
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.prepared.ensure_data import ensure_samples

IN_USE = "data that is made anew while somebody uses it"
PROBLEM = {
    "question": "Q?",
    "choices": ["x", "y"],
    "answer": 1,
    "hint": "",
    "image": None,
    "grade": "g",
    "subject": "s",
    "lecture": "L",
    "solution": "E",
}
ICON = {
    "question": "How many?",
    "choices": ["one", "two"],
    "answer": 1,
    "ques_type": "choose_txt",
    "grade": "g",
    "label": "A",
}


@attack(REUSED)
def images_below_the_inputs_folder(folder: Path) -> Shown:
    """Another folder of images is named, and both lie beside the file of conversations."""
    for name, colour in (("A", (200, 0, 0)), ("B", (0, 0, 200))):
        picture(folder / "raw" / name / "a.png", colour)
    chats(folder / "raw")
    config = recipe(folder, options={"val_fraction": "0.0", "images": str(folder / "raw" / "A")})
    packs(config)
    config = changing(config, options={**config.data.options, "images": str(folder / "raw" / "B")})
    return refuses_to_use(config, folder, "data.options.images was", "a.png differs")


@attack(REUSED)
def images_in_the_inputs_own_folder(folder: Path) -> Shown:
    """The folder of images was named, and was the file's own; now it is another one."""
    chats(folder / "raw")
    picture(folder / "other" / "a.png", (0, 0, 200))
    config = recipe(folder, options={"val_fraction": "0.0", "images": str(folder / "raw")})
    packs(config)
    config = changing(config, options={**config.data.options, "images": str(folder / "other")})
    return refuses_to_use(config, folder, "data.options.images was", "a.png differs")


@attack(REUSED)
def rationales_beside_the_problems(folder: Path) -> Shown:
    """Another file of rationales is named, and both lie in the folder of the official files."""
    write_json(folder / "raw" / "problems.json", {"7": PROBLEM, "8": PROBLEM})
    write_json(folder / "raw" / "pid_splits.json", {"train": ["7"], "val": ["8"]})
    first, second = (write_json(folder / "raw" / f"{text}.json", {"8": text}) for text in ("first", "second"))
    config = recipe(
        folder,
        source="scienceqa",
        input=str(folder / "raw"),
        options={"prompt_format": "QCMG-A", "rationales": str(first)},
    )
    ensure_samples(config, "val")
    config = changing(config, options={**config.data.options, "rationales": str(second)})
    return refuses_to_use(
        config,
        folder,
        "data.options.rationales was",
        "second.json differs",
        call=lambda one: ensure_samples(one, "val"),
    )


@attack(REUSED)
def a_folder_that_is_read_first(folder: Path) -> Shown:
    """IconQA that lay in `iconqa_data`, and now also above it, where it is looked for first."""
    raw = folder / "raw"
    for number in range(3):
        write_json(raw / "iconqa_data" / "train" / "choose_txt" / f"{number}" / "data.json", ICON)
        picture(raw / "iconqa_data" / "train" / "choose_txt" / f"{number}" / "image.png")
    config = recipe(folder, source="iconqa", input=str(raw), options={})
    ensure_samples(config, "train")
    shutil.copytree(raw / "iconqa_data" / "train" / "choose_txt" / "0", raw / "train" / "choose_txt" / "0")
    return refuses_to_use(config, folder, "is new", call=lambda one: ensure_samples(one, "train"))


@attack(REUSED)
def images_in_a_folder_that_is_read_first(folder: Path) -> Shown:
    """Flickr30k whose photos lay in `images`, and now also in `flickr30k-images`."""
    raw = folder / "raw"
    for number in range(4):
        picture(raw / "images" / f"{number}.png", (number, 0, 0))
    (raw / "results_20130124.token").write_text("".join(f"{number}.png#0\tPhoto {number}.\n" for number in range(4)))
    config = recipe(folder, source="flickr30k", input=str(raw), options={"val_images": "0", "test_images": "0"})
    ensure_samples(config, "train")
    for number in range(4):
        picture(raw / "flickr30k-images" / f"{number}.png", (0, number, 0))
    return refuses_to_use(config, folder, "flickr30k-images is new", call=lambda one: ensure_samples(one, "train"))


def _packed_with(folder: Path, changes: dict) -> Shown:
    """Packs of a tokenizer whose tokenizer.json is changed afterwards, with the vocabulary and the probes' tokens as
    they were."""
    place, samples = folder / "t", write_jsonl(folder / "s.jsonl", [sample(answer="red & blue")])
    fast(place)
    words = pack_words(samples, folder / "packs")
    words[words.index("--tokenizer") + 1] = place
    told(words, "1 packs")
    before = load_tokenizer(str(place))
    write_json(place / "tokenizer.json", {**json.loads((place / "tokenizer.json").read_text()), **changes})
    after, record = load_tokenizer(str(place)), read_made_from(folder / "packs")
    assert (
        record is not None and after.fingerprint == before.fingerprint and not tokenizer_changes(record, before, "mmt")
    )
    (line,) = tokenizer_changes(record, after, "mmt")
    return right(line)


@attack(STATE)
def a_normalizer_behind_the_same_vocabulary(folder: Path) -> Shown:
    """A normalizer that replaces one character, which no probe holds: packs were made without it."""
    return _packed_with(folder, {"normalizer": {"type": "Replace", "pattern": {"String": "&"}, "content": "and"}})


@attack(STATE)
def a_qformers_normalizer_behind_the_same_vocabulary(folder: Path) -> Shown:
    """The same in the tokenizer by which a Q-Former reads prompts."""
    place = Path(make_bert(folder / "bert"))
    source = InstructionSource(source=str(place), max_tokens=16)
    before = load_tokenizer("asset://tiny_llama", source).state()
    saved = json.loads((place / "tokenizer.json").read_text())
    saved["normalizer"] = {
        "type": "Sequence",
        "normalizers": [saved["normalizer"], {"type": "Replace", "pattern": {"String": "&"}, "content": "and"}],
    }
    write_json(place / "tokenizer.json", saved)
    after = load_tokenizer("asset://tiny_llama", source).state()
    changed = [library for library in before if before[library] != after[library]]
    assert len(changed) == 1 and changed[0].startswith("tokenizers "), (before, after)
    return right("its state differs, the LLM's does not")


@attack(STATE)
def another_text_each_time_with_a_system_turn(folder: Path) -> Shown:
    """A chat template that draws a greeting at random, in conversations with a system turn alone."""
    drawn = "{% if messages[0].role == 'system' %}{{ range(10) | random }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(fast(folder / "t", chat_template=drawn))
    return refuses(lambda: rendered_digest(tokenizer, "chat"), "chat template is not deterministic")


@attack(STATE)
def shown_with_another_tokenizer(folder: Path) -> Shown:
    """`vltrain peek` at packs whose tokenizer's folder holds another one by now: it would show other words."""
    samples, place = write_jsonl(folder / "s.jsonl", [sample()]), folder / "t"
    fast(place)
    words = pack_words(samples, folder / "packs")
    words[words.index("--tokenizer") + 1] = place
    told(words, "1 packs")
    told(["peek", folder / "packs"], ">>")
    shutil.rmtree(place)
    fast(place, text="other words alone, none of those before")
    return refused(["peek", folder / "packs"], "packed with another tokenizer")


@attack(IN_USE)
def packs_of_the_same_size(folder: Path) -> Shown:
    """A --rebuild beside a training run: its packs are replaced by others of the same size to the byte."""
    config = made(folder)
    used = packs(config)
    sizes = {file.name: file.bytes for file in used.manifest.files}
    chats(folder / "raw", answer="B")
    anew = packs(config, rebuild=True)
    assert {file.name: file.bytes for file in anew.manifest.files} == sizes
    return refuses(lambda: used.row(0), "was replaced while it was in use", "start again")


@attack(IN_USE)
def packs_of_the_same_size_in_a_worker(folder: Path) -> Shown:
    """The same for a process that is given the opened packs and maps their files by itself."""
    config = made(folder)
    used = pickle.dumps(packs(config))
    chats(folder / "raw", answer="B")
    packs(config, rebuild=True)
    return refuses(lambda: pickle.loads(used).row(0), "was replaced while it was in use", "start again")


@attack(REBUILT)
def a_root_of_links(folder: Path) -> Shown:
    """Samples and packs lie on another disk, to which links lead: that is where they are made anew."""
    config = made(folder)
    disk = folder / "disk"
    disk.mkdir()
    links = [folder / "root" / "samples", next((folder / "root" / "packed").iterdir())]
    for link in links:
        shutil.move(link, disk / link.name)
        link.symlink_to(disk / link.name)
    packs(config)
    chats(folder / "raw", answer="B")
    packs(config, rebuild=True)
    assert all(link.is_symlink() for link in links) and len(PackedDataset(links[1])) > 0
    assert "B" in (disk / "samples" / "train.jsonl").read_text() and sorted(
        path.name for path in disk.iterdir()
    ) == sorted(link.name for link in links)
    return right("links stay, and what they lead to is new")


@attack(REUSED)
def checked_where_one_stands(folder: Path) -> Shown:
    """`vltrain check data .` in the folder of packs itself."""
    made(folder)
    with contextlib.chdir(next((folder / "root" / "packed").iterdir())):
        return told(["check", "data", "."], "every byte as it was packed")


@attack(REUSED)
def prepared_from_places_by_relative_names(folder: Path) -> Shown:
    """The file and its images are named relative to where one stands, and later by their whole paths."""
    chats(folder / "raw")
    picture(folder / "raw" / "pictures" / "a.png")
    with contextlib.chdir(folder):
        told(
            prepare_words(
                "llava_json", Path("raw/chats.json"), Path("root/samples"), "images=raw/pictures", "val_fraction=0.0"
            ),
            "samples",
        )
    config = recipe(folder, options={"val_fraction": "0.0", "images": str(folder / "raw" / "pictures")})
    packs(config)
    picture(folder / "raw" / "pictures" / "a.png", (0, 0, 200))
    return refuses_to_use(config, folder, "a.png differs")


@attack(STATE)
def merges_of_another_tokenizer(folder: Path) -> Shown:
    """A merges.txt beside tokenizer.json that has its merges in another order, and one that has them as they are."""
    place = Path(fast(folder / "t"))
    merges = [" ".join(pair) for pair in json.loads((place / "tokenizer.json").read_text())["model"]["merges"]]
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join([*merges, "no merge", ""]))
    load_tokenizer(str(place))
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join([merges[1], merges[0], *merges[2:], ""]))
    return refuses(lambda: load_tokenizer(str(place)), "merges.txt:2", merges[1], merges[0])


@attack(REUSED)
def a_file_for_no_split(folder: Path) -> Shown:
    """Own samples whose option names `vall`: the folder's val.jsonl is read in its place, which is told."""
    write_jsonl(folder / "own" / "val.jsonl", [sample()])
    other = write_jsonl(folder / "other.jsonl", [sample(2)])
    config = recipe(folder, source="samples", input=str(folder / "own"), options={"vall": str(other)})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        assert ensure_samples(config, "val") == folder / "own" / "val.jsonl"
    finally:
        logging.getLogger().removeHandler(handler)
    (line,) = lines
    assert "data.options.vall" in line and "train, val, test" in line and str(other) in line
    return Shown("told", line)


@attack(REUSED)
def a_lower_limit_than_images_were_packed_under(folder: Path) -> Shown:
    """A recipe that allows fewer pixels than an image has that is packed already: found before the first step, not when
    it is shown."""
    config = made(folder)
    packs(changing(config, max_image_pixels=64))
    return refuses(
        lambda: packs(changing(config, max_image_pixels=63)),
        "image 0 of the packs",
        "64 pixels",
        "63",
        "max_image_pixels",
    )


@attack(REUSED)
def records_that_claim_to_be_older(folder: Path) -> Shown:
    """Records edited by hand, with a version whose text was not protected, or one that is none."""
    config, shown = made(folder), None
    for path in (
        folder / "root" / "samples" / "prepared.json",
        next((folder / "root" / "packed").iterdir()) / "made_from.json",
    ):
        text = path.read_text()
        for changed in (
            {"version": 1, "tokenizer": 5, "settled": None},
            {"version": "x"},
            {"version": None, "checksum": None},
        ):
            write_json(path, {**json.loads(text), **changed})
            shown = refuses(lambda: packs(config), path.name, "not as it was written", "--rebuild")
        path.write_text(text)
    packs(config)
    assert shown is not None
    return shown
