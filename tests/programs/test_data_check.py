"""`vltrain check data` reads everything: a change that leaves size, times and inode as they were is found too."""

import os

import pytest

from tests.attacks.attack import run_vltrain
from tests.attacks.inputs import chat, pack_words, picture, prepare_words, write_json
from vltrain.data.remote import blocks
from vltrain.data.shards import PackedDataset


@pytest.fixture
def root(tmp_path):
    """A data root made of one conversation about a picture."""
    picture(tmp_path / "raw" / "a.png")
    raw = write_json(tmp_path / "raw" / "chats.json", [chat(question="<image>\nWhat is it?", image="a.png")])
    assert run_vltrain(prepare_words("llava_json", raw, tmp_path / "root" / "samples", "val_fraction=0.0"))[0] == 0
    assert (
        run_vltrain(
            pack_words(tmp_path / "root" / "samples" / "train.jsonl", tmp_path / "root" / "packed" / "train-x")
        )[0]
        == 0
    )
    return tmp_path / "root"


def check(folder) -> tuple[int, str]:
    return run_vltrain(["check", "data", folder])


def test_what_was_made_is_proven(root):
    for folder in (root, root / "samples", root / "packed" / "train-x"):
        code, output = check(folder)
        assert code == 0 and "FAILED" not in output, output
    assert output.count("ok ") == 2 and "1 packs, 1 samples and 1 images" in output
    (root.parent / "raw").rename(root.parent / "elsewhere")
    code, output = check(root)
    assert code == 0 and "no longer exists" in output


@pytest.mark.parametrize(
    "name",
    [
        "samples/train.jsonl",
        "samples/images/a.png",
        "packed/train-x/packs-00000.arrow",
        "packed/train-x/blocks.index",
        "../raw/chats.json",
        "../raw/a.png",
    ],
)
def test_a_flipped_byte_is_found_whatever_its_times_say(root, name):
    path = root / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:  # the same inode
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, output = check(root)
    assert code == 1 and "FAILED" in output and path.name in output, output


def test_a_folder_of_neither_is_refused(tmp_path):
    code, output = check(tmp_path)
    assert code == 2 and "neither prepared samples" in output


def test_an_index_of_blocks_that_is_of_other_shards(root):
    """Whole by its own digest, and of this manifest, but not of these bytes."""
    folder = root / "packed" / "train-x"
    size, rows = 1 << 10, []
    checksum = PackedDataset(folder).manifest.checksum
    for name in ("packs-00000.arrow", "images-00000.arrow"):
        path = root / name
        path.write_bytes((folder / name).read_bytes())
        rows.append(blocks._describe(path, size))
    rows[0]["digests"] = [bytes(32)] * len(rows[0]["digests"])
    blocks.write_index(folder, rows, checksum, size)
    code, output = check(folder)
    assert code == 1 and "blocks.index: does not fit packs-00000.arrow; pack the samples again" in output, output
