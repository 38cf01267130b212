"""Data made in parts is, byte for byte, what one process makes; a part that is missing, damaged or of other data is
named."""

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_prep.pack import PackSettings, merge_parts, pack, pack_part
from data_prep.pack import main as pack_main
from data_prep.parts import Share, part_folder
from data_prep.prepare import main as prepare_main
from data_prep.prepare import prepare
from data_prep.tokens import _lines
from vltrain.errors import InputError

PARTS = 3


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.match("*.stats.npy")
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """LLaVA's JSON: 60 questions on 25 pictures, one of them far too long to pack."""
    folder, generator = tmp_path_factory.mktemp("raw"), random.Random(0)
    records = []
    for number in range(60):
        name = f"{number % 25}.png"
        Image.new("RGB", (20 + number % 25, 10), (number, 0, 0)).save(folder / name)
        text = "<image>\n" + " ".join("word" for _ in range(600 if number == 41 else generator.randrange(1, 30)))
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "ünïcode " * generator.randrange(1, 5)}]
        records.append({"id": f"s{number}", "image": name, "conversations": turns})
    (folder / "chats.json").write_text(json.dumps(records))
    return folder / "chats.json"


def packed(samples: Path, output: Path, share: Share | None = None, **changes):
    workers = changes.pop("workers", 1)
    wanted = {"tokenizer": "asset://tiny_llama", "visual_tokens": 4, "pack_length": 128, "over_long": "drop", **changes}
    settings = PackSettings(**wanted)
    if share is None:
        return pack(samples, output, settings, workers=workers)
    run = merge_parts if share.part is None else pack_part
    return run(samples, output, settings, share, workers=workers)


def test_prepared_in_parts(chats, tmp_path):
    prepare("llava_json", chats, tmp_path / "whole", workers=1)
    for part in (3, 1, 2):  # in any order, on machines of their own
        prepare("llava_json", chats, tmp_path / "merged", workers=1, share=Share(parts=PARTS, part=part))
        assert not (tmp_path / "merged").exists()
    prepare("llava_json", chats, tmp_path / "merged", share=Share(parts=PARTS, part=None))
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "whole"]


def test_drawn_images_in_parts(tmp_path):
    options = {"train_images": "12", "val_images": "2", "test_images": "2"}
    prepare("shapes", None, tmp_path / "whole", options, workers=1)
    for part in (1, 2, None):
        prepare("shapes", None, tmp_path / "merged", options, workers=1, share=Share(parts=2, part=part))
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_packed_in_parts(chats, tmp_path, parts):
    """100 parts of 60 lines: some have nothing to do."""
    prepare("llava_json", chats, tmp_path / "samples", workers=1)
    samples = next((tmp_path / "samples").glob("*.jsonl"))
    expected = packed(samples, tmp_path / "whole")
    assert expected.over_long == 4 and expected.num_packs > 5
    for part in range(1, parts + 1):
        assert packed(samples, tmp_path / "merged", Share(parts=parts, part=part)) is None
    assert packed(samples, tmp_path / "merged", Share(parts=parts, part=None)) == expected
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")
    assert not (tmp_path / "merged.parts").exists()


def test_lines_are_dealt_once_each(tmp_path):
    generator = random.Random(1)
    lines = [b"x" * generator.randrange(0, 40) + b"\n" for _ in range(50)] + [b"no line feed at the end"]
    (tmp_path / "file").write_bytes(b"".join(lines))
    size = (tmp_path / "file").stat().st_size
    for parts in (1, 2, 7, 50, size):
        share, found = Share(parts=parts, part=None), []
        for part in range(1, parts + 1):
            with (tmp_path / "file").open("rb") as stream:
                found += _lines(stream, *share.bounds(part, size))
        assert found == list(enumerate(lines, start=1))


def test_a_part_again(chats, tmp_path, capsys):
    words = ["--source", "llava_json", "--input", str(chats), "--output", str(tmp_path / "out"), "--parts", "2"]
    assert prepare_main([*words, "--part", "2"]) == 0
    assert prepare_main([*words, "--merge"]) == 2
    assert "1 of 2 parts are missing; run part 1, then merge again" in capsys.readouterr().err
    assert prepare_main([*words, "--part", "1"]) == 0
    before = files_of(tmp_path / "out.parts")
    assert prepare_main([*words, "--part", "1"]) == 0  # a task of the array that Slurm started twice
    assert files_of(tmp_path / "out.parts") == before
    shutil.rmtree(part_folder(tmp_path / "out", 1, 2))
    assert prepare_main([*words, "--part", "1"]) == 0
    assert files_of(tmp_path / "out.parts") == before
    assert prepare_main([*words, "--merge"]) == 0
    assert prepare_main([*words, "--part", "1"]) == 2
    assert "out: exists already" in capsys.readouterr().err


def test_damaged_and_foreign_parts_are_named(chats, tmp_path):
    prepare("llava_json", chats, tmp_path / "samples", workers=1)
    samples, output = next((tmp_path / "samples").glob("*.jsonl")), tmp_path / "packed"
    for part in (1, 2):
        packed(samples, output, Share(parts=2, part=part))
    merge = Share(parts=2, part=None)
    with pytest.raises(InputError, match="part-00001-of-00002: was made with other settings or data: seed was 0, is 7"):
        packed(samples, output, merge, seed=7)
    tokens = part_folder(output, 2, 2) / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="tokens.bin: missing or changed since it was written"):
        packed(samples, output, merge)
    tokens.write_bytes(whole)
    with samples.open("a") as file:
        file.write(samples.read_text().splitlines()[0].replace('"s0"', '"new"') + "\n")
    with pytest.raises(InputError, match="other settings or data: samples was"):
        packed(samples, output, merge)
    assert not output.exists()


def test_a_damaged_image_is_found_in_its_part(chats, tmp_path):
    prepare("llava_json", chats, tmp_path / "samples", workers=1)
    samples = next((tmp_path / "samples").glob("*.jsonl"))
    image = tmp_path / "samples" / "images" / "24.png"  # first shown in the middle of the file
    image.unlink()
    image.write_bytes(b"no picture")
    packed(samples, tmp_path / "out", Share(parts=3, part=1))
    with pytest.raises(InputError, match="sample 's24'"):
        packed(samples, tmp_path / "out", Share(parts=3, part=2))


def test_a_duplicate_in_two_parts_is_found_by_the_merge(chats, tmp_path):
    prepare("llava_json", chats, tmp_path / "samples", workers=1)
    samples = next((tmp_path / "samples").glob("*.jsonl"))
    samples.write_text(samples.read_text() + samples.read_text().splitlines()[0] + "\n")
    for part in (1, 2):
        packed(samples, tmp_path / "out", Share(parts=2, part=part))
    with pytest.raises(InputError, match="'s0' comes twice"):
        packed(samples, tmp_path / "out", Share(parts=2, part=None))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--part", "1"], "--parts N goes alone, with --part I or with --merge"),
        (["--merge"], "--parts N goes alone"),
        (["--parts", "2", "--part", "1", "--merge"], "--parts N goes alone"),
        (["--parts", "2", "--part", "3"], "found part 3 of 2"),
        (["--parts", "2", "--part", "0"], "found part 0 of 2"),
    ],
)
def test_contradictions(capsys, words, named):
    given = [
        "--samples",
        "s.jsonl",
        "--tokenizer",
        "t",
        "--visual-tokens",
        "4",
        "--pack-length",
        "64",
        "--output",
        "out",
    ]
    assert pack_main([*given, *words]) == 2
    assert named in capsys.readouterr().err
