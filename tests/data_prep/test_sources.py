"""Readers of raw data: formats against hand-written texts, and each mistake refused by name with nothing half
written."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from data_prep.pack import PackSettings, pack
from data_prep.peek import describe
from data_prep.prepare import main as prepare_main
from data_prep.prepare import prepare
from data_prep.sources.scienceqa import FORMATS, answer_of, prompt_of
from data_prep.tokenizer import train_tokenizer
from vltrain.data.shards import PackedDataset
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError

REAL = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "scienceqa_mini"
PROBLEM = {
    "question": "Q?",
    "choices": ["x", "y"],
    "answer": 1,
    "hint": "H",
    "image": None,
    "grade": "grade2",
    "subject": "s",
    "lecture": "LL",
    "solution": "EE",
}


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("A", "The answer is B."),
        ("AL", "The answer is B. BECAUSE: LL"),
        ("AE", "The answer is B. BECAUSE: EE"),
        ("ALE", "The answer is B. BECAUSE: LL EE"),
        ("LA", "LL The answer is B."),
        ("ELA", "EE LL The answer is B."),
        ("LEPA", "LL EE The answer is B."),
        ("LE", "LL EE"),
    ],
)
def test_targets(wanted, text):
    assert answer_of(PROBLEM, wanted) == text


def test_no_because_is_left_standing():
    assert answer_of({**PROBLEM, "lecture": "", "solution": " "}, "ALE") == "The answer is B."
    assert answer_of({**PROBLEM, "lecture": "", "solution": " "}, "LE") == "N/A"


def test_prompts():
    assert prompt_of(PROBLEM, "QCM") == "Question: Q?\nContext: H\nOptions: (A) x (B) y\nResponse:"
    assert prompt_of({**PROBLEM, "hint": ""}, "CQM") == "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y\nResponse:"
    assert prompt_of(PROBLEM, "QCMLE").endswith("BECAUSE: LL\nEE\nResponse:")
    assert {"QCM-ALE", "CQM-A", "QCM-LEPA", "QCMLE-A", "QCML-A", "QCME-A"} <= set(FORMATS)


def write_rationales(folder: Path, **splits: dict[str, str]) -> Path:
    """A run's folder with predictions of those splits."""
    for split, texts in splits.items():
        (folder / "eval" / split).mkdir(parents=True)
        lines = (json.dumps({"id": pid, "prediction": text}) + "\n" for pid, text in texts.items())
        (folder / "eval" / split / "predictions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def three_problems(tmp_path) -> Path:
    """One problem in each split: 1 in train, 2 in val, 3 in test."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps(dict.fromkeys("123", PROBLEM)))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["1"], "val": ["2"], "test": ["3"]}))
    return folder


def prompts(folder: Path) -> dict[str, tuple[str, str]]:
    """(prompt, target) of each split's one sample."""
    samples = {split: json.loads((folder / f"{split}.jsonl").read_text()) for split in ("train", "val", "test")}
    return {split: (sample["turns"][0]["text"], sample["turns"][1]["text"]) for split, sample in samples.items()}


@pytest.mark.parametrize("train", ["gold", "generated"])
def test_the_second_stage_reads_written_rationales_and_gold_ones_only_for_training(tmp_path, three_problems, train):
    run = write_rationales(
        tmp_path / "run", train={"1": "written for 1"}, val={"2": "written for 2 <image>"}, test={"3": " "}
    )
    options = {"prompt_format": "QCMG-A", "rationales": str(run), "train_rationales": train}
    prepare("scienceqa", three_problems, tmp_path / "out", options)
    shown = {"train": "LL EE" if train == "gold" else "written for 1", "val": "written for 2 <\\image>", "test": "N/A"}
    asked = "Question: Q?\nContext: H\nOptions: (A) x (B) y\nSolution: {}\nResponse:"
    assert prompts(tmp_path / "out") == {
        split: (asked.format(text), "The answer is B.") for split, text in shown.items()
    }


def test_rationales_may_be_a_file_of_all_splits(tmp_path, three_problems):
    (tmp_path / "all.json").write_text(json.dumps({pid: f"written for {pid}" for pid in "123"}))
    prepare(
        "scienceqa",
        three_problems,
        tmp_path / "out",
        {"prompt_format": "CQMG-A", "rationales": str(tmp_path / "all.json")},
    )
    shown = {
        split: prompt.split("Solution: ")[1].split("\n")[0] for split, (prompt, _) in prompts(tmp_path / "out").items()
    }
    assert shown == {"train": "LL EE", "val": "written for 2", "test": "written for 3"}


@pytest.mark.parametrize(
    ("written", "changes", "named"),
    [
        (
            {"val": {"2": "x"}},
            {},
            "test/predictions.jsonl: no such file; write it: vltrain evaluate .*run --split test",
        ),
        ({"val": {}, "test": {"3": "x"}}, {}, "val/predictions.jsonl: no rationale of problem '2'"),
        ({"val": {"2": "x", "3": "y"}, "test": {"3": "x"}}, {}, "1 problem.* not in val of pid_splits.json .3."),
        ({"val": {"2": "x"}, "test": {"3": "x"}}, {"train_rationales": "generated"}, "--split train"),
        ({}, {"rationales": "gone"}, "gone: no such file; expected a run's folder or a file"),
        ({}, {"rationales": None}, "QCMG-A needs the option rationales"),
        ({}, {"prompt_format": "QCM-A"}, "rationales: has no effect: prompt_format QCM-A"),
        (
            {},
            {"prompt_format": "QCM-A", "rationales": None, "train_rationales": "generated"},
            "train_rationales: has no effect",
        ),
        ({}, {"train_rationales": "golden"}, "found 'golden', expected gold or generated"),
    ],
)
def test_mistakes_about_rationales_name_file_and_problem(tmp_path, three_problems, written, changes, named):
    run = write_rationales(tmp_path / "run", **written)
    run.mkdir(exist_ok=True)
    options = {"prompt_format": "QCMG-A", "rationales": str(run), **changes}
    with pytest.raises(InputError, match=named):
        prepare(
            "scienceqa",
            three_problems,
            tmp_path / "out",
            {name: value for name, value in options.items() if value is not None},
        )
    assert not (tmp_path / "out").exists()


def write_scienceqa(folder: Path, **changes) -> Path:
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps({"7": {**PROBLEM, **changes}}))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"answer": 2}, "answer: found 2, expected 0 to 1"),
        ({"choices": []}, "choices"),
        ({"lecture": None}, "lecture"),
        ({"image": "image.png"}, "image.png"),
    ],
)
def test_scienceqa_mistakes_name_problem_and_key(tmp_path, changes, named):
    raw = write_scienceqa(tmp_path / "raw", **changes)
    with pytest.raises(InputError, match=named) as caught:
        prepare("scienceqa", raw, tmp_path / "out", {})
    assert "7" in str(caught.value) and not (tmp_path / "out").exists()


def test_unknown_names_are_met_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'QCM-ALE'"):
        prepare("scienceqa", tmp_path, tmp_path / "out", {"prompt_format": "QCM-ALEE"})
    with pytest.raises(InputError, match="scienceqa"):
        prepare("sciencqa", tmp_path, tmp_path / "out", {})


@pytest.mark.skipif(not REAL.exists(), reason="the ScienceQA sample is not on this machine")
def test_real_scienceqa_becomes_samples(tmp_path):
    counts = prepare("scienceqa", REAL, tmp_path / "out", {"missing_images": "drop"})
    assert counts["test"] == 50
    with pytest.raises(InputError, match="missing_images=drop"):
        prepare("scienceqa", REAL, tmp_path / "strict", {})


def write_llava(folder: Path, records: list) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def talk(answer="yes", text="<image>\nred?", **fields):
    return {
        "id": "one",
        "image": "a.png",
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}],
        **fields,
    }


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (talk(image="gone.png"), "gone.png"),
        (talk(image="broken.png"), "broken.png"),
        (talk(answer=" "), "empty answer"),
        (talk(text="red?"), "no <image> in its turns"),
        (talk(image=None), "0 image"),
        (talk(image="../a.png"), "leads out"),
        ({"id": "x"}, "expected id"),
        (talk(image=7), "image: found 7"),
        (talk(image={"a.png": 1}), "expected a file's name"),
        (talk(image=["a.png", 7]), "expected a file's name"),
    ],
)
def test_llava_mistakes_end_with_exit_code_2(tmp_path, capsys, record, named):
    file = write_llava(tmp_path / "raw", [record])
    assert prepare_main(["--source", "llava_json", "--input", str(file), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert named in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(InputError):
        prepare("llava_json", write_llava(tmp_path / "raw", []), tmp_path / "out", {})


@pytest.fixture
def prepared(tmp_path):
    records = [{**talk(answer="yes" if number % 2 else "no"), "id": f"s{number}"} for number in range(40)]
    prepare("llava_json", write_llava(tmp_path / "raw", records), tmp_path / "samples", {"val_fraction": 0.0})
    text = tmp_path / "text.txt"
    text.write_text("Image: N/A red? yes no\n" * 30)
    train_tokenizer([text], 285, tmp_path / "tokenizer")
    return tmp_path / "samples" / "train.jsonl", str(tmp_path / "tokenizer")


def pack_of(samples, tokenizer, pack_length, output):
    settings = PackSettings(tokenizer=tokenizer, visual_tokens=2, pack_length=pack_length)
    return pack(samples, output, settings, workers=1)


def test_every_sample_is_packed_once_and_peek_shows_it(prepared, tmp_path):
    samples, tokenizer = prepared
    manifest = pack_of(samples, tokenizer, 100, tmp_path / "packs")
    dataset = PackedDataset(tmp_path / "packs")
    rows = [dataset.row(number) for number in range(len(dataset))]
    assert sorted(name for row in rows for name in row.sample_ids) == sorted(f"s{number}" for number in range(40))
    assert all(len(row.input_ids) <= 100 for row in rows)
    assert manifest.num_images == 1 and all(len(row.image_ids) == 1 for row in rows)  # forty samples, one picture
    shown = describe(dataset, 0, load_tokenizer(tokenizer))
    assert "[u_image][BOS]Image: [image 0: 2 tokens]\nred?" in shown and ("yes[EOS]<<" in shown or "no[EOS]<<" in shown)


def test_over_long_samples_are_refused_or_listed_never_cut(prepared, tmp_path):
    samples, tokenizer = prepared
    with pytest.raises(InputError, match="do not fit into a pack of 12"):
        pack_of(samples, tokenizer, 12, tmp_path / "packs")
    assert not (tmp_path / "packs").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_shards_are_noticed(prepared, tmp_path, damage):
    samples, tokenizer = prepared
    pack_of(samples, tokenizer, 100, tmp_path / "packs")
    for file in sorted((tmp_path / "packs").iterdir()):
        # The one says only what need not be read again, the other of which blocks a copy in a bucket is made.
        if file.match("*.stats.npy") or file.name == "blocks.index":
            continue
        original = file.read_bytes()
        changed = bytearray(original)
        if damage == "flip":
            changed[len(changed) // 2] ^= 1
        else:
            changed = changed[:-1] if file.suffix == ".arrow" else changed[: len(changed) // 2]
        file.write_bytes(changed)
        with pytest.raises(InputError):
            PackedDataset(tmp_path / "packs")
        file.write_bytes(original)
    assert len(PackedDataset(tmp_path / "packs")) > 0
