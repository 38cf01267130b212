"""Files of several sets packed together are packed as one file of their samples would be, each by SET/ID."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_prep.pack import main as pack_main
from data_prep.prepare import prepare
from tests.data_prep.test_parts import files_of
from vltrain.data.origin import read_made_from, read_prepared
from vltrain.data.shards import PackedDataset

NUM = 30
HOW = ["--tokenizer", "asset://tiny_llama", "--visual-tokens", "4", "--pack-length", "64", "--workers", "1", "--quiet"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Two sets with the same ids and names of images; one image is the same in both."""
    folder = tmp_path_factory.mktemp("sets")
    for name, shade in (("cats", 90), ("dogs", 180)):
        raw = folder / "raw" / name
        raw.mkdir(parents=True)
        records = []
        for number in range(NUM):
            colour = (9, 9, 9) if number == 3 else (shade, number, 200)
            Image.new("RGB", (12, 12), colour).save(raw / f"{number}.png")
            turns = [
                {"from": "human", "value": f"<image>\nwhat {name}?"},
                {"from": "gpt", "value": "word " * (1 + number % 7)},
            ]
            records.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
        (raw / "chats.json").write_text(json.dumps(records))
        prepare("llava_json", raw / "chats.json", folder / name, {"val_fraction": "0"}, workers=1)
    return {name: folder / name / "train.jsonl" for name in ("cats", "dogs")}


def named(sets: dict[str, Path]) -> list[str]:
    return ["--samples", *(f"{name}={file}" for name, file in sets.items())]


@pytest.fixture(scope="module")
def together(sets, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("together") / "packed"
    assert pack_main([*named(sets), *HOW, "--output", str(output)]) == 0
    return output


def test_as_one_file_of_all(sets, together, tmp_path):
    lines = []
    for name, file in sets.items():
        shutil.copytree(file.parent / "images", tmp_path / name / "images")
        for line in file.read_text().splitlines():
            one = json.loads(line)
            one["id"], one["images"] = f"{name}/{one['id']}", [f"{name}/{image}" for image in one["images"]]
            lines.append(json.dumps(one))
    (tmp_path / "all.jsonl").write_text("".join(line + "\n" for line in lines))
    assert pack_main(["--samples", str(tmp_path / "all.jsonl"), *HOW, "--output", str(tmp_path / "packed")]) == 0
    expected, found = files_of(tmp_path / "packed"), files_of(together)
    records = {"made_from.json", "made_from.arrow"}
    assert {name: data for name, data in found.items() if name not in records} == {
        name: data for name, data in expected.items() if name not in records
    }
    packs = PackedDataset(together, verify=True)
    ids = [one for number in range(len(packs)) for one in packs.row(number).sample_ids]
    assert sorted(ids) == sorted(f"{name}/s{number}" for name in sets for number in range(NUM))
    assert packs.manifest.num_images == 2 * NUM - 1


def test_where_they_came_from_is_recorded(sets, together):
    made = read_made_from(together)
    assert made is not None and made.prepared is None and made.name == "cats=train.jsonl, dogs=train.jsonl"
    for name, file in sets.items():
        prepared = read_prepared(file.parent)
        assert prepared is not None and made.sets[name]["prepared"] == prepared.samples
        assert f"{name}: llava_json" in (made.source or "")


def test_in_parts(sets, together, tmp_path):
    words = [*named(sets), *HOW, "--output", str(tmp_path / "packed")]
    for part in ("3", "1", "2"):
        assert pack_main([*words, "--parts", "3", "--part", part]) == 0
    assert pack_main([*words, "--parts", "3", "--merge"]) == 0
    assert files_of(tmp_path / "packed") == files_of(together)
    assert pack_main([*named(sets), *HOW, "--output", str(tmp_path / "in_turn"), "--parts", "4"]) == 0
    assert files_of(tmp_path / "in_turn") == files_of(together)


def test_parts_of_other_files_are_refused(sets, tmp_path, capfd):
    words = [*HOW, "--output", str(tmp_path / "packed"), "--parts", "2"]
    assert pack_main([*named(sets), *words, "--part", "1"]) == 0
    other = {"cats": sets["cats"], "birds": sets["dogs"]}
    assert pack_main([*named(other), *words, "--part", "1"]) == 2
    assert "was made with other settings or data: samples was" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["{cats}", "{dogs}"], "found '{cats}', expected SET=FILE"),
        (["cats={cats}", "cats={dogs}"], "set 'cats' comes twice; give each file a name of its own"),
        (["a/b={cats}", "dogs={dogs}"], "found 'a/b={cats}', expected SET=FILE"),
        (["cats={cats}", "dogs={cats}"], "is named twice, as 'cats' and 'dogs'; leave one out"),
        (["cats={cats}", "dogs={dogs}x"], "{dogs}x: cannot be read (no such file), expected a file of samples"),
        (["cats={cats}", "dogs={folder}"], "cannot be read (it is a folder), expected a file of samples"),
        (
            ["cats={cats}", "lost={lost}"],
            "sample 'lost/s0', image {lost_image}: cannot be read (No such file or directory)",
        ),
        (["cats={cats}", "out={out}"], "{out}:1: sample 's0': image path '../x.png' leads out of"),
        (["cats={cats}", "twice={twice}"], "sample id 'twice/s0' comes twice; ids must be"),
    ],
)
def test_what_is_refused(sets, tmp_path, capfd, given, told):
    first = sets["cats"].read_text().splitlines()[0]
    for name, lines in (
        ("lost", [first]),
        ("twice", [first, first]),
        ("out", [first.replace("images/0.png", "../x.png")]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    shutil.copytree(sets["cats"].parent / "images", tmp_path / "twice" / "images")
    places = {**sets, "folder": sets["cats"].parent, "lost_image": tmp_path / "lost" / "images" / "0.png"}
    places.update((name, tmp_path / name / "train.jsonl") for name in ("lost", "twice", "out"))
    words = ["--samples", *(text.format(**places) for text in given), *HOW, "--output", str(tmp_path / "packed")]
    assert pack_main(words) == 2
    error = capfd.readouterr().err
    assert told.format(**places) in error and error.count("\n") == 1 and not (tmp_path / "packed").exists()
