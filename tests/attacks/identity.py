"""Attacks on what data is made from: prepared samples and packs that lie there already and were made from something
else."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks.attack import Shown, attack, refused, refuses, right
from tests.attacks.inputs import TOKENIZER, chat, pack_words, picture, prepare_words, sample, write_json, write_jsonl
from vltrain.config.schema import Config, DataConfig
from vltrain.data.shards import PackedDataset
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.prepared.ensure_data import ensure_samples
from vltrain.prepared.origins import data_identity, require_same_set, require_trained_set
from vltrain.prepared.training_data import open_packs

REUSED = "what was made from something else is used again"
REBUILT = "--rebuild makes anew what does not match, and nothing else"
MOVED = "moving changes nothing"
OWN = "own samples prepare nothing"
FILLED = "a data root is never filled with another data set"
PARTS = "parts of a set were made from one thing"
VISUAL_TOKENS = 4
logging.getLogger("vltrain.prepared.ensure_data").setLevel(logging.WARNING)


def chats(folder: Path, answer: str = "A", name: str = "chats.json") -> Path:
    picture(folder / "a.png")
    return write_json(
        folder / name,
        [chat(f"{answer}{number}", question="<image>\nQ?", answer=answer, image="a.png") for number in range(9)],
    )


def recipe(folder: Path, **data: Any) -> Config:
    told = {
        "source": "llava_json",
        "input": str(folder / "raw" / "chats.json"),
        "root": str(folder / "root"),
        "pack_length": 64,
        "options": {"val_fraction": "0.0"},
        "workers": 0,
    }
    return Config(data=DataConfig(**{**told, **data}))


def packs(config: Config, *, rebuild: bool = False) -> PackedDataset:
    return open_packs(
        config, TemplateEncoder(load_tokenizer(TOKENIZER), config.data.template, VISUAL_TOKENS), rebuild=rebuild
    )


def made(folder: Path, **data: Any) -> Config:
    """A recipe whose data is ready, made from `raw`/chats.json."""
    chats(folder / "raw")
    config = recipe(folder, **data)
    packs(config)
    return config


def changing(config: Config, **data: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.match("*.stats.npy")
    }


def refuses_to_use(
    config: Config, folder: Path, *needles: str, call: Callable[[Config], Any] = packs, below: str = "root"
) -> Shown:
    """Both ways out are named, and nothing `below` is touched."""
    before = listing(folder / below)
    shown = refuses(lambda: call(config), *needles, "--rebuild", "data.root")
    assert listing(folder / below) == before
    return shown


@attack(REUSED)
def another_input(folder: Path) -> Shown:
    """The same root with another input file."""
    config = made(folder)
    other = chats(folder / "other", "B")
    return refuses_to_use(changing(config, input=str(other)), folder, "data.input was", "other/chats.json")


@attack(REUSED)
def another_source(folder: Path) -> Shown:
    """The same root with another source."""
    return refuses_to_use(
        changing(made(folder), source="shapes", input=None, options={}),
        folder,
        "data.source was llava_json",
        "is shapes",
    )


@attack(REUSED)
def edited_input(folder: Path) -> Shown:
    """The raw file edited after it was prepared."""
    config = made(folder)
    chats(folder / "raw", "Z")
    return refuses_to_use(config, folder, "raw/chats.json differs")


@attack(REUSED)
def edited_input_of_the_same_size_and_time(folder: Path) -> Shown:
    """An edit that keeps size and modification time."""
    config = made(folder)
    file = folder / "raw" / "chats.json"
    before = file.stat()
    file.write_text(file.read_text().replace('"A"', '"B"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    return refuses_to_use(config, folder, "raw/chats.json differs")


@attack(REUSED)
def edited_raw_image(folder: Path) -> Shown:
    """A raw image painted over, the annotations as they were."""
    config = made(folder)
    picture(folder / "raw" / "a.png", (0, 0, 255))
    return refuses_to_use(config, folder, "raw/a.png differs")


@attack(REUSED)
def missing_raw_image(folder: Path) -> Shown:
    """A raw image removed."""
    config = made(folder)
    (folder / "raw" / "a.png").unlink()
    return refuses_to_use(config, folder, "raw/a.png is gone")


@attack(REUSED)
def another_option(folder: Path) -> Shown:
    """An option that draws other splits."""
    return refuses_to_use(
        changing(made(folder), options={"val_fraction": "0.5"}), folder, "data.options.val_fraction was 0.0, is 0.5"
    )


@attack(REUSED)
def an_option_left_to_its_default(folder: Path) -> Shown:
    """An option that was given and is now left out."""
    return refuses_to_use(
        changing(made(folder), options={}), folder, "data.options.val_fraction was 0.0, is 0.02 (its default)"
    )


@attack(REUSED)
def edited_samples(folder: Path) -> Shown:
    """The prepared JSONL edited by hand."""
    config = made(folder)
    file = folder / "root" / "samples" / "train.jsonl"
    file.write_text(file.read_text().replace('"id": "A', '"id": "N'))
    return refuses_to_use(config, folder, "samples/train.jsonl differs")


@attack(REUSED)
def edited_prepared_image(folder: Path) -> Shown:
    """A prepared image painted over."""
    config = made(folder)
    picture(folder / "root" / "samples" / "images" / "a.png", (0, 255, 0))
    return refuses_to_use(config, folder, "images/a.png differs")


@attack(REUSED)
def edited_split_that_is_evaluated(folder: Path) -> Shown:
    """A validation file edited: it is in no pack."""
    config = recipe(folder, options={"val_fraction": "0.4"})
    write_json(folder / "raw" / "chats.json", [chat(f"s{number}") for number in range(40)])
    file = ensure_samples(config, "val")
    file.write_text(file.read_text().replace('"yes"', '"no"'))
    return refuses_to_use(config, folder, "samples/val.jsonl differs", call=lambda one: ensure_samples(one, "val"))


@attack(REUSED)
def packs_of_samples_that_were_prepared_anew(folder: Path) -> Shown:
    """Samples removed and prepared again from other data; the packs of the first ones are still there."""
    config = made(folder)
    shutil.rmtree(folder / "root" / "samples")
    chats(folder / "raw", "B")
    return refuses_to_use(
        config,
        folder,
        "packed/train-",
        "was packed from something else",
        "samples/train.jsonl differs",
        below="root/packed",
    )


@attack(REUSED)
def packs_of_older_versions(folder: Path) -> Shown:
    """Packs without a record, and other samples beside them."""
    config = made(folder)
    for path in (folder / "root").glob("packed/*/made_from*"):
        path.unlink()
    shutil.rmtree(folder / "root" / "samples")
    chats(folder / "raw", "B")
    return refuses_to_use(config, folder, "'A0'", "in one of them only", below="root/packed")


@attack(REUSED)
def rationales_that_were_written_anew(folder: Path) -> Shown:
    """A second stage whose samples hold what the first one wrote, after that was trained again."""
    problem = {
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
    write_json(folder / "raw" / "problems.json", {"7": problem, "8": problem})
    write_json(folder / "raw" / "pid_splits.json", {"train": ["7"], "val": ["8"]})
    written = write_json(folder / "written.json", {"8": "first"})
    options = {"prompt_format": "QCMG-A", "rationales": str(written)}
    config = recipe(folder, source="scienceqa", input=str(folder / "raw"), options=options)
    ensure_samples(config, "val")
    write_json(written, {"8": "second"})
    return refuses_to_use(config, folder, "written.json differs", call=lambda one: ensure_samples(one, "val"))


@attack(REUSED)
def a_question_added_to_a_folder(folder: Path) -> Shown:
    """A source that lists folders, and one folder more."""

    def question(pid: str) -> None:
        place = folder / "raw" / "train" / "fill_in_blank" / pid
        picture(place / "image.png")
        write_json(
            place / "data.json",
            {"question": "Q?", "answer": "3", "ques_type": "fill_in_blank", "grade": "g", "label": "l"},
        )

    question("1")
    config = recipe(folder, source="iconqa", input=str(folder / "raw"), options={})
    ensure_samples(config, "train")
    question("2")
    return refuses_to_use(
        config, folder, "fill_in_blank holds other files", call=lambda one: ensure_samples(one, "train")
    )


@attack(REUSED)
def an_image_that_was_missing(folder: Path) -> Shown:
    """Questions dropped for want of an image that is there now."""
    problem = {
        "question": "Q?",
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "grade": "g",
        "subject": "s",
        "lecture": "",
        "solution": "",
    }
    write_json(folder / "raw" / "problems.json", {"7": problem, "8": {**problem, "image": None}})
    write_json(folder / "raw" / "pid_splits.json", {"train": ["7", "8"]})
    config = recipe(folder, source="scienceqa", input=str(folder / "raw"), options={"missing_images": "drop"})
    ensure_samples(config, "train")
    picture(folder / "raw" / "images" / "train" / "7" / "image.png")
    return refuses_to_use(config, folder, "image.png is new", call=lambda one: ensure_samples(one, "train"))


@attack(REUSED)
def a_record_edited_by_hand(folder: Path) -> Shown:
    """The record itself made to say what the recipe says."""
    config = made(folder)
    file = folder / "root" / "samples" / "prepared.json"
    file.write_text(file.read_text().replace('"0.0"', '"0.5"'))
    return refuses(
        lambda: packs(changing(config, options={"val_fraction": "0.5"})),
        "prepared.json",
        "changed or damaged",
        "--rebuild",
    )


@attack(REUSED)
def packs_of_another_set_beside_samples(folder: Path) -> Shown:
    """`data.train_packs` of one set, and the samples of another one to be answered."""
    config = made(folder)
    packed = next((folder / "root" / "packed").iterdir())
    other = recipe(folder, root=str(folder / "other"), input=str(chats(folder / "raw2", "B")), train_packs=str(packed))
    ensure_samples(changing(other, train_packs=None), "train")
    samples = ensure_samples(other, "train")
    assert config.data.root != other.data.root
    return refuses(
        lambda: require_same_set(other, PackedDataset(packed), samples),
        "data.train_packs",
        "would be answered",
        "data.source samples",
    )


def trained(folder: Path, config: Config) -> Path:
    """A run's folder that says which samples stood beside it."""
    return write_json(folder / "run" / "run.json", {"data": {"samples": data_identity(config, "train")}}).parent


@attack(REUSED)
def evaluated_on_samples_that_were_made_anew(folder: Path) -> Shown:
    """A run's data root made anew from other data, and the run evaluated."""
    config = made(folder)
    run = trained(folder, config)
    require_trained_set(run, config, ())
    chats(folder / "raw", "B")
    packs(config, rebuild=True)
    require_trained_set(run, config, ("data.root",))
    return refuses(
        lambda: require_trained_set(run, config, ("eval.batch_size",)), "other samples now than when", "--data.root"
    )


@attack(REUSED)
def evaluated_beside_edited_own_samples(folder: Path) -> Shown:
    """Own training samples edited after the run, and the run evaluated."""
    config = own(folder)
    run = trained(folder, config)
    write_jsonl(folder / "own" / "train.jsonl", [sample("new")])
    return refuses(lambda: require_trained_set(run, config, ()), "other samples now than when", "--data.source samples")


@attack(REBUILT)
def rebuilt(folder: Path) -> Shown:
    """An edited input, made anew on request."""
    config = made(folder)
    chats(folder / "raw", "B")
    assert {name[0] for name in packs(config, rebuild=True).row(0).sample_ids} == {"B"}
    assert sorted(path.name for path in (folder / "root").iterdir()) == ["packed", "samples"]
    return right("samples and packs are those of the edited input, and nothing else is left there")


@attack(REBUILT)
def rebuilt_in_vain(folder: Path) -> Shown:
    """Made anew from what is damaged: what was there stays."""
    config = made(folder)
    before = listing(folder / "root")
    (folder / "raw" / "chats.json").write_text("[")
    shown = refuses(lambda: packs(config, rebuild=True), "chats.json")
    assert listing(folder / "root") == before
    return shown


@attack(REBUILT)
def rebuild_of_what_matches(folder: Path) -> Shown:
    """Nothing has changed: nothing is made."""
    config = made(folder)
    before = {path: path.stat().st_ino for path in (folder / "root").rglob("*")}
    packs(config, rebuild=True)
    assert {path: path.stat().st_ino for path in (folder / "root").rglob("*")} == before
    return right("every file is the one that was there")


@attack(REBUILT)
def prepare_over_samples(folder: Path) -> Shown:
    """`vltrain prepare` into a folder of samples, without the word for it."""
    words = prepare_words("llava_json", chats(folder / "raw"), folder / "root" / "samples", "val_fraction=0")
    made(folder)
    return refused(words, "exists already", untouched=folder / "root")


@attack(MOVED)
def moved_and_copied(folder: Path) -> Shown:
    """Root and raw data copied elsewhere, with other times and inodes, the old ones gone."""
    config = made(folder)
    for name in ("raw", "root"):
        shutil.copytree(folder / name, folder / "new" / name, copy_function=shutil.copyfile)
        shutil.rmtree(folder / name)
    moved = changing(config, input=str(folder / "new" / "raw" / "chats.json"), root=str(folder / "new" / "root"))
    before = listing(folder / "new")
    assert packs(moved).row(0).sample_ids and listing(folder / "new") == before
    return right("used as they are, nothing was written anew")


@attack(MOVED)
def moved_and_edited(folder: Path) -> Shown:
    """The same, and one picture of the copy painted over."""
    config = made(folder)
    shutil.copytree(folder / "raw", folder / "new")
    picture(folder / "new" / "a.png", (1, 2, 3))
    return refuses_to_use(changing(config, input=str(folder / "new" / "chats.json")), folder, "new/a.png differs")


@attack(MOVED)
def another_name_that_is_not_there(folder: Path) -> Shown:
    """An input that does not exist: nothing shows that the samples were made from it."""
    config = made(folder)
    return refuses_to_use(
        changing(config, input=str(folder / "nowhere.json")), folder, "nowhere.json, which is not there"
    )


@attack(FILLED)
def own_data_in_the_default_root(folder: Path) -> Shown:
    """Own data without a data.root: the default one is easy-VQA's."""
    config = recipe(folder, input=str(chats(folder / "raw")))
    return refuses(
        lambda: packs(changing(config, root=DataConfig().root)), "data.root", "kept for easyvqa", "llava_json"
    )


@attack(FILLED)
def a_root_that_is_not_there(folder: Path) -> Shown:
    """A root with a slip of the pen, and no source: easy-VQA must not be prepared there."""
    config = Config(data=DataConfig(root=str(folder / "roott")))
    shown = refuses(lambda: packs(config), "roott/samples", "data.source names nothing")
    assert not (folder / "roott").exists()
    return shown


@attack(FILLED)
def packs_by_name_and_no_samples(folder: Path) -> Shown:
    """`data.train_packs`, and a root that is not there for the evaluation."""
    made(folder)
    packed = str(next((folder / "root" / "packed").iterdir()))
    other = recipe(folder, root=str(folder / "missing"), train_packs=packed)
    shown = refuses(lambda: ensure_samples(other, "val"), "data.train_packs", "missing/samples", "data.source samples")
    assert not (folder / "missing").exists()
    return shown


def own(folder: Path, **data: Any) -> Config:
    for split in ("train", "val"):
        write_jsonl(folder / "own" / f"{split}.jsonl", [sample(f"{split}{number}") for number in range(4)])
    return recipe(folder, **{"source": "samples", "input": str(folder / "own"), "options": {}, **data})


@attack(OWN)
def own_samples_in_place(folder: Path) -> Shown:
    """Own JSONL is read where it is: nothing is prepared, copied or written beside it."""
    config = own(folder)
    before = listing(folder / "own")
    assert packs(config).row(0).sample_ids and ensure_samples(config, "val") == folder / "own" / "val.jsonl"
    assert listing(folder / "own") == before and [path.name for path in (folder / "root").iterdir()] == ["packed"]
    return right("packed in place; only packs were made")


@attack(OWN)
def own_samples_edited(folder: Path) -> Shown:
    """Own samples edited after they were packed."""
    config = own(folder)
    packs(config)
    write_jsonl(folder / "own" / "train.jsonl", [sample(f"new{number}") for number in range(4)])
    return refuses_to_use(config, folder, "own/train.jsonl differs")


@attack(OWN)
def own_image_edited(folder: Path) -> Shown:
    """An own image painted over after it was packed."""
    config = own(folder)
    picture(folder / "own" / "a.png")
    write_jsonl(folder / "own" / "train.jsonl", [sample("1", question="<image>\nQ?", images=("a.png",))])
    packs(config)
    picture(folder / "own" / "a.png", (9, 9, 9))
    return refuses_to_use(config, folder, "own/a.png differs")


@attack(OWN)
def one_file_and_no_other_split(folder: Path) -> Shown:
    """One file of samples, and an evaluation that has none."""
    config = own(folder)
    config = changing(config, input=str(folder / "own" / "train.jsonl"))
    assert ensure_samples(config, "train") == folder / "own" / "train.jsonl"
    return refuses(lambda: ensure_samples(config, "val"), "no samples of 'val'", "data.options.val")


@attack(OWN)
def own_samples_as_a_source_to_prepare(folder: Path) -> Shown:
    """`vltrain prepare --source samples`."""
    words = prepare_words("samples", write_jsonl(folder / "s.jsonl", [sample()]), folder / "out")
    return refused(words, "unknown source 'samples'", "data.source: samples", untouched=folder)


@attack(PARTS)
def raw_data_edited_between_parts(folder: Path) -> Shown:
    """The input edited after part 1 of 2."""
    raw = chats(folder / "raw")
    words = [*prepare_words("llava_json", raw, folder / "samples", "val_fraction=0"), "--parts", 2]
    for part in (1, 2):
        assert run(*words, "--part", part) == 0
    chats(folder / "raw", "B")
    return refused([*words, "--merge"], "other settings or data", "raw was", untouched=folder)


@attack(PARTS)
def image_edited_between_parts_of_packs(folder: Path) -> Shown:
    """An image exchanged after a part had decoded it."""
    picture(folder / "a.png")
    samples = write_jsonl(folder / "s.jsonl", [sample("1", question="<image>\nQ?", images=("a.png",)), sample("2")])
    words = [*pack_words(samples, folder / "packs"), "--parts", 1]
    assert run(*words, "--part", 1) == 0
    (folder / "a.png").write_bytes(b"no picture any more")
    return refused([*words, "--merge"], "a.png", "changed since a part decoded it", untouched=folder)


def run(*words: Any) -> int:
    from vltrain.cli import main

    return main([str(word) for word in words])


@attack(REUSED)
def samples_changed_while_they_are_packed(folder: Path) -> Shown:
    """A line added to the file between reading it and writing the packs."""
    from data_prep.steps import sample_files as program

    samples = write_jsonl(folder / "s.jsonl", [sample("1")])
    whole = program.tokenised

    def slow(*given: Any, **told: Any):
        yield from whole(*given, **told)
        samples.write_text(samples.read_text() + json.dumps(sample("2")) + "\n")

    program.tokenised = slow
    try:
        return refused(pack_words(samples, folder / "packs"), "changed while it was packed")
    finally:
        program.tokenised = whole


@attack(REUSED)
def a_split_put_beside_prepared_ones(folder: Path) -> Shown:
    """A hand-made SPLIT.jsonl in a folder of prepared samples."""
    config = made(folder)
    samples = folder / "root" / "samples"
    shutil.copyfile(samples / "train.jsonl", samples / "hard.jsonl")
    return refuses(
        lambda: ensure_samples(config, "hard"), "hard.jsonl", "was not prepared from llava_json", "data.source samples"
    )


@attack(REUSED)
def a_test_split_of_another_set(folder: Path) -> Shown:
    """A test split of other samples, copied to where the source gave none."""
    config = made(folder)
    samples = folder / "root" / "samples"
    write_jsonl(samples / "test.jsonl", [sample("1")])
    return refuses(lambda: ensure_samples(config, "test"), "test.jsonl", "was not prepared from llava_json")
