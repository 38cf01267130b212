"""`source: datasets`: every format gives the rows that were written, in their order, with the very bytes of their
images; and each mistake is one line before anything is there."""

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pack import PackSettings, pack
from data_prep.parts import Share
from data_prep.prepare import main as prepare_main
from data_prep.prepare import prepare
from data_prep.reading import Reading
from data_prep.sources import SOURCES
from tests.data_prep.test_parts import files_of
from tests.support import tables
from tests.support.processes import ROOT
from vltrain.data.origin import SAMPLES_RECORD, read_made_from, read_prepared
from vltrain.errors import InputError
from vltrain.files.record import read_record
from vltrain.schema import escape_markers

FORMATS = {
    "parquet": tables.as_parquet, "json lines": tables.as_json_lines, "json list": tables.as_json_list,
    "csv": tables.as_csv, "imagefolder": tables.as_imagefolder, "webdataset": tables.as_webdataset,
    "arrow": tables.as_arrow,
}  # fmt: skip
IN_TAR = {"question": "json.question", "answer": "json.answer", "image": "png"}


def samples_of(folder: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def prepared(input: Path | None, output: Path, **options) -> list[dict]:
    workers = options.pop("workers", 1)
    prepare("datasets", input, output, {"val_fraction": "0", **options}, workers=workers)
    return samples_of(output)


def table_of(folder: Path, rows: list[dict], name: str = "rows.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_in_their_order(tmp_path, name):
    input = FORMATS[name](tmp_path / "raw")
    found = prepared(input, tmp_path / "out", **(IN_TAR if name == "webdataset" else {}))
    assert len(found) == tables.NUM_ROWS
    for sample, row in zip(found, tables.rows(), strict=True):
        assert sample["turns"] == [
            {"role": "user", "text": f"<image>\n{escape_markers(row['question'])}"},
            {"role": "assistant", "text": row["answer"]},
        ]
        assert sample["metadata"] == {"answer": row["answer"]}
        assert [(tmp_path / "out" / image).read_bytes() for image in sample["images"]] == [row["image"]]
    assert len({sample["id"] for sample in found}) == tables.NUM_ROWS


def test_workers_and_parts_change_no_byte(tmp_path):
    input = tables.as_parquet(tmp_path / "raw")
    prepare("datasets", input, tmp_path / "one", workers=1)
    prepare("datasets", input, tmp_path / "two", workers=2)
    for part in (2, 1, 3):
        prepare("datasets", input, tmp_path / "merged", workers=1, share=Share(parts=3, part=part))
    prepare("datasets", input, tmp_path / "merged", workers=1, share=Share(parts=3, part=None))
    prepare("datasets", input, tmp_path / "turn", workers=1, share=Share(parts=3, part=None, in_turn=True))
    whole = files_of(tmp_path / "one")
    assert "val.jsonl" in whole and files_of(tmp_path / "two") == whole
    assert files_of(tmp_path / "merged") == whole and files_of(tmp_path / "turn") == whole


def test_of_a_row_group_little_is_held(tmp_path):
    """However far the samples are from the file's end."""
    draw = random.Random(0)
    rows = {"question": [draw.randbytes(500).hex() for _ in range(16_000)], "answer": ["yes"] * 16_000}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    held = pa.total_allocated_bytes()
    samples = SOURCES["datasets"](tmp_path / "rows.parquet", {"val_fraction": "0"})
    most = max(pa.total_allocated_bytes() for _ in samples)
    assert most - held < 6 << 20 < (tmp_path / "rows.parquet").stat().st_size


def test_equal_images_are_kept_once_and_held_out_together(tmp_path):
    input = tables.as_parquet(tmp_path / "raw")
    prepare("datasets", input, tmp_path / "out", {"val_fraction": "0.3"}, workers=1)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == tables.NUM_IMAGES
    shown = [{image for sample in samples_of(tmp_path / "out", split) for image in sample["images"]}
             for split in ("train", "val")]  # fmt: skip
    assert shown[0] and shown[1] and not shown[0] & shown[1]


def test_splits_of_its_own(tmp_path):
    made = tables.rows()
    for split, some in (("train", made[:10]), ("validation", made[10:15]), ("test", made[15:])):
        tables.as_parquet(tmp_path / "raw", 1, split, some)
    prepare("datasets", tmp_path / "raw", tmp_path / "out", workers=1)
    sizes = {split: len(samples_of(tmp_path / "out", split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 10, "val": 5, "test": 9}
    prepare("datasets", tmp_path / "raw", tmp_path / "other", {"train": "test", "val": "none", "test": "validation",
                                                               "val_fraction": "0"}, workers=1)  # fmt: skip
    assert not (tmp_path / "other" / "val.jsonl").exists()
    assert [len(samples_of(tmp_path / "other", split)) for split in ("train", "test")] == [9, 5]


def test_where_it_came_from_is_recorded(tmp_path):
    input = tables.as_parquet(tmp_path / "raw")
    (input / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Drawn\n")
    prepared(input, tmp_path / "out")
    made = read_prepared(tmp_path / "out")
    assert made is not None
    assert made.provenance | {"fingerprint": ""} == {
        "licence": "cc-by-4.0", "config": "default", "format": "parquet", "fingerprint": ""
    }  # fmt: skip
    record = read_record(tmp_path / "out" / SAMPLES_RECORD, made.files)
    read = {name for place, name in zip(record.places, record.names, strict=True) if place == "data.input"}
    assert read == {".", "README.md", *(path.name for path in input.glob("*.parquet"))}, "no module of a library"
    settings = PackSettings(tokenizer="asset://tiny_llama", visual_tokens=4, pack_length=128)
    pack(tmp_path / "out" / "train.jsonl", tmp_path / "packs", settings, workers=1)
    packs = read_made_from(tmp_path / "packs")
    assert packs is not None and packs.provenance == made.provenance
    shutil.copy(input / "train-00000-of-00003.parquet", input / "train-more.parquet")
    prepared(input, tmp_path / "again")
    again = read_prepared(tmp_path / "again")
    assert again is not None and again.provenance["fingerprint"] != made.provenance["fingerprint"]


def test_choices_hints_labels_and_lists(tmp_path):
    rows = [
        {"q": "which?", "a": right, "c": ["red", "blue", "B"], "h": hint, "k": "colour", "i": number}
        for number, (right, hint) in enumerate([("1", None), ("blue", "look"), ("(b)", ""), ("B", None)])
    ]
    input = table_of(tmp_path, rows)
    options = {"question": "q", "answer": "a", "choices": "c", "hint": "h", "category": "k", "id": "i"}
    with pytest.raises(InputError, match=r"row 0, column 'a': found \"1\", expected one of the choices: .* 0 to 2"):
        prepared(input, tmp_path / "out", **options)
    found = prepared(input, tmp_path / "out", **options, unusable="drop")
    assert [sample["metadata"]["answer"] for sample in found] == [1, 1, 2], "a text before a letter"
    assert [sample["id"] for sample in found] == ["1", "2", "3"]
    assert [sample["turns"][0]["text"] for sample in found][:2] == [
        "look\nwhich?\n(a) red (b) blue (c) B", "which?\n(a) red (b) blue (c) B"
    ]  # fmt: skip
    assert found[0]["turns"][1]["text"] == "(b) blue" and found[0]["metadata"]["category"] == "colour"
    asked = table_of(tmp_path / "b", [{"q": "what?", "a": ["cat", "dog", "dog"]}])
    (sample,) = prepared(asked, tmp_path / "out2", question="q", answer="a", prompt="Q: {question} A:")
    assert (sample["turns"][0]["text"], sample["turns"][1]["text"]) == ("Q: what? A:", "dog")
    assert sample["metadata"] == {"answer": "dog", "answers": ["cat", "dog", "dog"]}


def test_class_labels_of_an_imagefolder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "1.png").write_bytes(tables.picture(len(name)))
    (tmp_path / "raw" / "dog" / "2.png").write_bytes(tables.picture(7))
    with pytest.raises(InputError, match=r"found no column of its own for question and answer; there are image, label"):
        prepared(tmp_path / "raw", tmp_path / "out")
    # what an imagefolder asks is the same of every image, which no column says: a table does
    with pytest.raises(InputError, match=r"no column 'labels' \(answer=\), did you mean 'label'\?; there are"):
        prepared(tmp_path / "raw", tmp_path / "out", answer="labels")
    found = prepared(tmp_path / "raw", tmp_path / "out", question="label", answer="label")
    assert [sample["turns"][1]["text"] for sample in found] == ["cat", "dog", "dog"]


ONE, TWO = tables.picture(1), tables.picture(2)
CONTENT = [{"type": "image", "text": None}, {"type": "text", "text": "and this one?"}]
CHATS = {
    "openai": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>what?"},
                            {"role": "assistant", "content": "one"}], "images": [ONE]},
    "parts": {"messages": [{"role": "user", "content": CONTENT}, {"role": "assistant", "content":
                            [{"type": "text", "text": "two"}]}], "images": [TWO]},
    "image in the part": {"chat": [{"role": "user", "content": [{"type": "text", "text": "see ", "image": None},
                                    {"type": "image", "text": None, "image": {"bytes": TWO, "path": None}}]},
                                   {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "<image><image>differ?"},
                                   {"from": "gpt", "value": "yes"}],
                 "images": [{"bytes": ONE, "path": "a.png"}, {"bytes": TWO, "path": "b.png"}]},
    "lists": {"conversations": {"from": ["human", "gpt"], "value": ["why?", "so"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "shown"),
    [
        ("openai", "Be brief.", [ONE]),
        ("parts", "<image>and this one?", [TWO]),
        ("image in the part", "see <image>", [TWO]),
        ("sharegpt", "<image><image>differ?", [ONE, TWO]),
        ("lists", "why?", []),
    ],
)
def test_columns_of_conversations(tmp_path, name, first, shown):
    input = table_of(tmp_path, [CHATS[name]])
    (sample,) = prepared(input, tmp_path / "out", **({"chat": "chat"} if "chat" in CHATS[name] else {}))
    assert sample["turns"][0]["text"] == first and sample["turns"][-1]["role"] == "assistant"
    assert [(tmp_path / "out" / image).read_bytes() for image in sample["images"]] == shown


def broken_parquet(folder: Path) -> Path:
    """Its third row group is not as it was written: the header is sound."""
    input = tables.as_parquet(folder, 2)
    file = input / "train-00001-of-00002.parquet"
    meta = pq.read_metadata(file).row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = meta.dictionary_page_offset or meta.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(bytes(data))
    return input


def broken_tar(folder: Path) -> Path:
    input = tables.as_webdataset(folder)
    file = input / "train-0001.tar"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 - 700])
    return input


def mixed(folder: Path) -> Path:
    folder.mkdir()
    lines = [{"question": "q", "answer": "a"}, {"question": "q", "answer": {"text": "a"}}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder / "rows.jsonl"


def nothing(folder: Path) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("")
    return folder / "rows.jsonl"


def elsewhere(folder: Path) -> Path:
    tables.as_parquet(folder)
    (folder.parent / "secret.parquet").write_bytes((folder / "train-00000-of-00003.parquet").read_bytes())
    card = "---\nconfigs:\n- config_name: default\n  data_files: ../secret.parquet\n---\n"
    (folder / "README.md").write_text(card)
    return folder


def of_rows(*rows):
    return lambda folder: table_of(folder, list(rows))


ROW = {"question": "q", "answer": "a", "image": ONE}


def filtered(folder: Path) -> Path:
    tables.as_parquet(folder)
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n  filters: [[number, '>', 3]]\n---\n"
    (folder / "README.md").write_text(card)
    return folder


MISTAKES = {
    "no such column": (tables.as_parquet, ["question=qestion"],
                       "split 'train': has no column 'qestion' (question=), did you mean 'question'?; there are "
                       "question, answer, image"),
    "no such field": (tables.as_webdataset, ["question=json.questions", "answer=json.answer", "image=png"],
                      "column 'json' has no field 'questions' (question=); there are"),
    "no such split": (tables.as_parquet, ["val=dev"], "has no split 'dev' (val=); there is train"),
    "nothing there": (lambda folder: folder, [], "no such file or folder; expected a data set"),
    "empty file": (nothing, [], "rows.jsonl: is empty, expected rows"),
    "mixed types": (mixed, [], "rows.jsonl:2, column 'answer': found {\"text\": \"a\"}, expected a text"),
    "no image": (of_rows({**ROW, "image": 3}), [], "column 'image' (image=) holds int64, expected an image: bytes"),
    "no text": (of_rows(ROW, {**ROW, "answer": None}), [], "row 1, column 'answer': found null, expected a text"),
    "damaged image": (of_rows(ROW, {**ROW, "image": b"GIF89a"}), [], "sample 'train-1', image images/"),
    "path outside": (of_rows({**ROW, "image": "../x.png"}), [], "found the path '../x.png', which leads out"),
    "address": (of_rows({**ROW, "image": "http://127.0.0.1/x.png"}), [],
                "found the address 'http://127.0.0.1/x.png', and addresses are not fetched"),
    "another scheme": (of_rows({**ROW, "image": "file:///etc/passwd"}), ["urls=fetch"], "found 'file:///etc/passwd'"),
    "damaged parquet": (broken_parquet, [], "train-00001-of-00002.parquet: damaged in rows 5 to 9: "),
    "damaged tar": (broken_tar, ["question=json.question", "answer=json.answer", "image=png"],
                    "train-0001.tar: cut short behind member"),
    "files elsewhere": (elsewhere, [], "secret.parquet leads out of"),
    "two columns of one": (of_rows({**CHATS["lists"], "question": "q"}), ["question=question", "chat=conversations"],
                           "question= and chat=conversations: expected one or the other"),
    "filters": (filtered, [], "its card leaves rows out (filters), which is not read here"),
    "unknown format": (tables.as_parquet, ["format=parket"], "option 'format': unknown 'parket', did you mean"),
    "a format without its files": (tables.as_csv, ["format=parquet"], "rows.csv: damaged, or no parquet: Parquet"),
    "no effect": (tables.as_parquet, ["url_seconds=3"], "option 'url_seconds': has no effect without urls=fetch"),
    "two places": (tables.as_parquet, ["hub=owner/name"], "found both --input and hub=, expected"),
    "an id twice": (of_rows({**ROW, "id": 1}, {**ROW, "id": 1}), ["id=id", "val_fraction=0"], "'1' comes twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capfd, name):
    make, options, told = MISTAKES[name]
    input = make(tmp_path / "raw")
    words = ["--source", "datasets", "--input", str(input), "--output", str(tmp_path / "out"), "--quiet"]
    assert prepare_main([*words, "--workers", "1", "--options", *options]) == 2
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_neither_place():
    with pytest.raises(InputError, match="found neither --input nor hub=, expected a file or folder"):
        prepare("datasets", None, Path("out"))


def test_other_commands_do_not_load_the_library():
    command = (
        "import sys, data_prep.prepare, data_prep.pack, vltrain.cli; "
        "sys.exit(any(one in sys.modules for one in ('datasets', 'pandas', 'fsspec', 'aiohttp')))"
    )
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


TEXTS = ["007", "2020-01-01", "True", "None", "1e5", "NaN", "null"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_texts_stay_as_they_are_written(tmp_path, form):
    """Whatever else they could be read as, in the first rows and in those far behind."""
    texts = ["a word"] * 200 + TEXTS
    if form == "csv":
        lines = ["question,answer", *(f"q{number},{text}" for number, text in enumerate(texts))]
    else:
        lines = [json.dumps({"question": f"q{number}", "answer": text}) for number, text in enumerate(texts)]
    (tmp_path / f"rows.{form}").write_text("\n".join(lines) + "\n")
    found = prepared(tmp_path / f"rows.{form}", tmp_path / "out")
    assert [sample["metadata"]["answer"] for sample in found] == texts


def test_turns_of_texts_and_of_parts_in_one_file(tmp_path):
    """As files of chats have them: a column of two types."""
    part = [{"type": "text", "text": "hello"}]
    records = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "hi"}]}
               for asked in ["hello"] * 150 + [part]]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    found = prepared(tmp_path / "rows.jsonl", tmp_path / "out")
    assert {sample["turns"][0]["text"] for sample in found} == {"hello"} and len(found) == 151


def test_what_other_threads_open_is_no_raw_data(tmp_path):
    """A lock's sign of life falls into a reading that takes long, in the folder of the file that is read."""

    def slowly():
        (tmp_path / "raw").read_bytes()
        other = threading.Thread(target=(tmp_path / ".lock").write_text, args=("alive",))
        other.start()
        other.join()
        yield 1

    (tmp_path / "raw").write_text("data")
    reading = Reading({"data.input": tmp_path / "raw"})
    assert list(reading.watch(slowly())) == [1]
    (tmp_path / ".lock").write_text("again")
    assert reading.record([]).names == ["."]
