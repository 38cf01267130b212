"""A process that dies anywhere in a save, or finds the disk full there, loses nothing older; no damaged file is ever
used."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.tiny import make_segments, write_packs
from tests.train.checkpoints.test_checkpoint import BELONGS_TO, Net, save, state_of
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.receipts.manifest import dumps, pointed
from vltrain.train.checkpoints import checkpoint as checkpoints
from vltrain.train.checkpoints.checkpoint import newest_checkpoint, open_checkpoint, save_checkpoint

CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


class Died(BaseException):
    """In the place of a process's death: nothing that cleans up catches it."""


def fail_at(monkeypatch, call: int, error: BaseException, after: bool = False) -> list[str]:
    """The `call`-th call to the file system fails, before or after its work is done. Returns the list that the calls
    are noted in."""
    made: list[str] = []

    def wrap(name, function):
        def wrapped(*args, **kwargs):
            made.append(name)
            number = len(made)  # of this call: it may make others
            if number == call and not after:
                raise error
            result = function(*args, **kwargs)
            if number == call:
                raise error
            return result

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr(checkpoints, "save_file", wrap("save_file", checkpoints.save_file))
    return made


def content(path: Path) -> dict:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_call_leaves_what_was_there_or_the_new_one(tmp_path, after):
    call, ended = 0, False
    while not ended:
        call += 1
        root = tmp_path / str(call)
        save(Net(), root, 1)
        older = content(save(Net(), root, 2))
        with pytest.MonkeyPatch.context() as patch:
            made = fail_at(patch, call, Died(), after)
            try:
                save(Net(), root, 3)
                ended = True
            except Died:
                pass
        newest = newest_checkpoint(root)
        assert newest.step in ((3,) if ended else (2, 3)), made
        assert content(root / "step-00000002") == older
        assert open_checkpoint(pointed(root, "latest")).step in (2, 3)
        save(Net(), root, 4)  # a life after that one, which finds no rubbish in its way and leaves none
        assert sorted(path.name for path in root.iterdir()) == [
            "latest",
            *(["step-00000003"] if newest.step == 3 else ["step-00000002"]),
            "step-00000004",
        ]
    assert call > 12 and {"fsync", "rename", "mkdir", "save_file"} <= set(made)


def test_an_error_of_the_disk_at_any_call_is_told_and_cleans_up(tmp_path):
    save(Net(), tmp_path, 1)
    for call in range(1, 8):
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, OSError(28, "No space left on device"))
            with pytest.raises(InputError, match="could not be saved.*No space left"):
                save(Net(), tmp_path, 2)
        assert newest_checkpoint(tmp_path).step == 1 and pointed(tmp_path, "latest").name == "step-00000001"
        assert not list(tmp_path.glob(".partial-*"))


def test_what_reads_back_differently_never_becomes_a_checkpoint(tmp_path, monkeypatch):
    save(Net(), tmp_path, 1)
    write = checkpoints.save_file

    def faulty(tensors, path):
        write(tensors, path)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(checkpoints, "save_file", faulty)
    with pytest.raises(InputError, match="reads back with other values"):
        save(Net(), tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 1


def test_the_best_is_kept_and_checkpoints_of_an_abandoned_life_go(tmp_path):
    for step in (2, 4, 6, 8):
        save_checkpoint(
            state_of(Net()), tmp_path, step=step, belongs_to=BELONGS_TO, keep=1, is_writer=True, keep_best=True
        )
        if step == 2:
            (tmp_path / "best").write_text("step-00000002\n")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000008"]
    (tmp_path / "step-00000008" / "checkpoint.json").write_text("{}")  # damaged: the run goes on from 2, and saves 3
    save(Net(), tmp_path, 3)
    assert newest_checkpoint(tmp_path).step == 3 and not (tmp_path / "step-00000008").exists()


def test_saving_a_step_again_leaves_no_name_without_a_checkpoint(tmp_path, monkeypatch):
    save(Net(), tmp_path, 1)
    save(Net(), tmp_path, 2)
    rename = Path.rename

    def checked(self, target):
        result = rename(self, target)
        found = pointed(tmp_path, "latest")
        assert found is None or open_checkpoint(found)
        return result

    monkeypatch.setattr(Path, "rename", checked)
    net = Net()
    save(net, tmp_path, 2)
    assert torch.equal(dict(newest_checkpoint(tmp_path).weights())["up.bias"], net.up.bias)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "weights-00001.safetensors/../../x", "weights.pt", "/etc/passwd"]
)
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path, name):
    path = save(Net(), tmp_path, 1)
    rewrite(path, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(InputError, match="plain files of the checkpoint's own folder"):
        open_checkpoint(path)


def rewrite(path: Path, change) -> None:
    """Changes a manifest and makes its checksum fit: what an attacker could do."""
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    (path / "checkpoint.json").write_text(dumps(manifest))


def test_a_link_in_a_checkpoint_is_refused(tmp_path):
    path = save(Net(), tmp_path, 1)
    file = path / "weights-00001.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="own folder"):
        open_checkpoint(path)


def test_a_file_that_the_manifest_does_not_list_is_not_read(tmp_path):
    net = Net()
    path = save(net, tmp_path, 1)
    shutil.copy(path / "weights-00001.safetensors", path / "weights-00002.safetensors")
    (path / "weights-00003.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    assert dict(open_checkpoint(path).weights()).keys() == {"up.weight", "up.bias"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 100_000,
        "nul",
        "[]",
        "1e999999",
        '{"sha256": "x", "format": {}, "step": 1, "belongs_to": 1, "files": []}',
    ],
)
def test_a_manifest_that_is_a_bomb_is_refused(tmp_path, text):
    path = save(Net(), tmp_path, 1)
    (path / "checkpoint.json").write_text(text)
    with pytest.raises(InputError, match="checkpoint"):
        open_checkpoint(path)


def test_a_huge_manifest_is_refused_without_reading_it(tmp_path, monkeypatch):
    path = save(Net(), tmp_path, 1)
    monkeypatch.setattr("vltrain.receipts.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(InputError, match="larger than 100 bytes"):
        open_checkpoint(path)


def damages(size: int, generator: random.Random, flips: int, cuts: int):
    """(position, bit) of flips, and lengths to cut to."""
    yield from ((generator.randrange(size), 1 << generator.randrange(8)) for _ in range(flips))
    yield from ((length, None) for length in {0, size - 1, *(generator.randrange(size) for _ in range(cuts))})


def every_damage_is_noticed(folder: Path, opens, flips: int, cuts: int) -> int:
    """Damages each file of a folder in turn. Returns how many flips were tried."""
    generator, tried = random.Random(0), 0
    # blocks.index is read of a copy in a bucket alone, where each block is compared with it.
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "blocks.index"):
        original = file.read_bytes()
        for position, bit in damages(len(original), generator, flips, cuts):
            damaged = bytearray(original)
            if bit is None:
                del damaged[position:]
            else:
                damaged[position] ^= bit
                tried += 1
            file.write_bytes(damaged)
            with pytest.raises(InputError):
                opens(folder)
        file.write_bytes(original)
    opens(folder)
    return tried


@pytest.mark.parametrize(
    ("flips", "cuts"), [pytest.param(6, 3, id="sample"), pytest.param(150, 40, marks=pytest.mark.slow, id="full")]
)
def test_flipped_bytes_and_truncations_are_noticed_before_use(tmp_path, flips, cuts):
    packs = write_packs(tmp_path / "packs", make_segments(8))
    tried = every_damage_is_noticed(packs, PackedDataset, flips, cuts)
    tried += every_damage_is_noticed(save(Net(), tmp_path / "run", 1), open_checkpoint, flips, cuts)
    assert tried == 7 * flips  # manifest, index, packs, images; manifest, weights, optimizer
