"""Checkpoints on disk: whole or not there, verified before use, and never mistaken for another model's."""

import json
import os
import random
import shutil

import pytest
import torch

from vltrain.config.older_runs import ADDED
from vltrain.errors import InputError
from vltrain.receipts.manifest import dumps
from vltrain.train.checkpoints import checkpoint as checkpoints
from vltrain.train.checkpoints.checkpoint import load_trainable, newest_checkpoint, open_checkpoint, save_checkpoint
from vltrain.train.run.identity import require_same_run

BELONGS_TO = {"optim": {"lr": 0.1}, "data": "abc"}


class Net(torch.nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.up = torch.nn.Linear(3, width)


def state_of(net):
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            weight = parameter.detach().clone()
            yield name, weight, {"exp_avg": weight * 2, "exp_avg_sq": weight * weight}


def save(net, root, step, keep=2):
    return save_checkpoint(state_of(net), root, step=step, belongs_to=BELONGS_TO, keep=keep, is_writer=True)


def test_round_trip_holds_trained_weights_and_averages_only(tmp_path):
    net, other = Net(), Net()
    found = open_checkpoint(save(net, tmp_path, 7))
    assert found.step == 7 and found.belongs_to == BELONGS_TO
    states = found.optimizer_states()
    assert states.keys() == {"up.weight", "up.bias"} == dict(found.weights()).keys()
    assert torch.equal(states["up.weight"]["exp_avg_sq"], net.up.weight**2)
    frozen_before = other.frozen.weight.clone()
    load_trainable(other, found)
    assert torch.equal(other.up.weight, net.up.weight) and torch.equal(other.up.bias, net.up.bias)
    assert torch.equal(other.frozen.weight, frozen_before)


def test_shards_of_bounded_size_hold_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 40)
    net = Net()
    path = save(net, tmp_path, 1)
    assert len(list(path.glob("optimizer-*.safetensors"))) > 1
    assert torch.equal(open_checkpoint(path).optimizer_states()["up.bias"]["exp_avg"], net.up.bias * 2)


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    for step in (2, 4, 6):
        save(Net(), tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000006"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000006"
    assert newest_checkpoint(tmp_path).step == 6


def test_every_flipped_byte_is_noticed_and_the_one_before_is_used(tmp_path):
    save(Net(), tmp_path, 1)
    path = save(Net(), tmp_path, 2)
    generator = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for position in {0, len(original) - 1, *generator.sample(range(len(original)), 12)}:
            damaged = bytearray(original)
            damaged[position] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=str(path)):
                open_checkpoint(path)
            assert newest_checkpoint(tmp_path).step == 1
        file.write_bytes(original[:-1])
        with pytest.raises(InputError):
            open_checkpoint(path)
        file.write_bytes(original)
    assert newest_checkpoint(tmp_path).step == 2


def test_a_save_that_died_half_way_is_not_seen(tmp_path):
    save(Net(), tmp_path, 1)
    whole = save(Net(), tmp_path, 2)
    half = tmp_path / "step-00000003"
    shutil.copytree(whole, half)
    (half / "checkpoint.json").unlink()
    (tmp_path / ".partial-step-00000004").mkdir()
    assert newest_checkpoint(tmp_path).step == 2


def test_no_checkpoint_at_all(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda net: setattr(net, "up", torch.nn.Linear(3, 6)), "up.*shape"),
        (lambda net: setattr(net, "more", torch.nn.Linear(1, 1)), "lacks 2 trained.*more"),
        (lambda net: net.up.requires_grad_(False), "does not train"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, damage, named):
    found = open_checkpoint(save(Net(), tmp_path, 1))
    other = Net()
    damage(other)
    with pytest.raises(InputError, match=named):
        load_trainable(other, found)


def test_another_run_is_refused_naming_each_difference(tmp_path):
    found = open_checkpoint(save(Net(), tmp_path, 1))
    require_same_run(found, json.loads(json.dumps(BELONGS_TO)))
    with pytest.raises(InputError, match="data was 'abc', is 'xyz'; optim.lr was 0.1, is 0.2"):
        require_same_run(found, {"optim": {"lr": 0.2}, "data": "xyz"})


def test_a_full_disk_loses_nothing_older(small_disk):
    save(Net(), small_disk, 1)
    with pytest.raises(InputError, match=r"step-00000002: .*could not be saved.*step-00000001"):
        save(Net(width=20_000), small_disk, 2)
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "step-00000001"]
    assert newest_checkpoint(small_disk).step == 1


def newer_format(path):
    manifest = json.loads((path / "checkpoint.json").read_text())
    del manifest["sha256"]
    (path / "checkpoint.json").write_text(dumps({**manifest, "format": 2, "told": "by tomorrow's version"}))


def link_elsewhere(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def flipped_byte(path):
    file = path / "weights-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def a_file_in_its_place(path):
    shutil.rmtree(path)
    path.write_text("moved to the archive")


def renamed(path):
    path.rename(path.with_name("step-00000009"))


def a_pipe_for_a_manifest(path):
    (path / "checkpoint.json").unlink()
    os.mkfifo(path / "checkpoint.json")


UNUSABLE = [newer_format, link_elsewhere, flipped_byte, a_file_in_its_place, renamed, a_pipe_for_a_manifest]


@pytest.mark.parametrize("spoil", UNUSABLE)
def test_checkpoints_that_cannot_be_used_are_never_taken_for_none_nor_removed(tmp_path, spoil, caplog):
    root = tmp_path / "checkpoints"
    spoil(save(Net(), root, 4))
    (spoilt,) = (path for path in root.iterdir() if path.name.startswith("step-"))
    inode = os.stat(spoilt).st_ino
    with pytest.raises(
        InputError, match=f"none of its checkpoints can be used: .*{spoilt.name}.*does not start at step 0"
    ):
        newest_checkpoint(root)

    shutil.copytree(save(Net(), tmp_path / "older", 2), root / "step-00000002")
    assert newest_checkpoint(root).step == 2 and f"skipped a checkpoint: {spoilt}" in caplog.text
    for step in (3, 4, 5, 9, 10):  # before it, in its place, past it
        save(Net(), root, step, keep=1)
    assert newest_checkpoint(root).step == 10
    assert sorted(path.name for path in root.glob("step-*")) == ["step-00000010"]
    assert inode in {os.stat(path).st_ino for path in root.glob(f"skipped-{spoilt.name}*")}


def test_a_whole_checkpoint_of_a_life_that_was_left_still_goes(tmp_path):
    for step in (2, 4):
        save(Net(), tmp_path, step)
    save(Net(), tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_an_older_one_of_another_version_is_not_counted_and_stays(tmp_path):
    newer_format(save(Net(), tmp_path, 1))
    for step in (2, 3, 4):
        save(Net(), tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003", "step-00000004"]


def test_latest_that_leads_nowhere_is_told(tmp_path, caplog):
    shutil.rmtree(save(Net(), tmp_path, 4))
    with pytest.raises(InputError, match="latest: names step-00000004, which does not exist"):
        newest_checkpoint(tmp_path)
    shutil.copytree(save(Net(), tmp_path / "older", 2), tmp_path / "step-00000002")
    assert newest_checkpoint(tmp_path).step == 2 and "names step-00000004" in caplog.text


def test_best_that_cannot_be_read_lets_nothing_go(tmp_path):
    for step in (1, 2):
        save(Net(), tmp_path, step)
    (tmp_path / "best").write_text("the first\n")
    with pytest.raises(InputError, match="best: found 'the first'"):
        save_checkpoint(
            state_of(Net()), tmp_path, step=3, belongs_to=BELONGS_TO, keep=1, is_writer=True, keep_best=True
        )
    assert len(list(tmp_path.glob("step-*"))) == 3


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = save(Net(), tmp_path, 1)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (*path.iterdir(), tmp_path / "latest")}
    assert len(modes) == 4 and set(modes.values()) == {0o666 & ~umask}


def test_a_setting_that_the_run_did_not_know_counts_as_what_was_done_before_it(tmp_path, monkeypatch):
    found = open_checkpoint(save(Net(), tmp_path, 1))
    now = {"optim": {"lr": 0.1, "lookahead": [0.5, 1.0]}, "data": "abc"}
    with pytest.raises(InputError, match="optim.lookahead was None"):
        require_same_run(found, now)
    monkeypatch.setitem(ADDED, "optim.lookahead", (0.5, 1.0))
    require_same_run(found, now)
    with pytest.raises(InputError, match=r"optim.lookahead was \[0.5, 1.0\], is None"):
        require_same_run(found, {**now, "optim": {"lr": 0.1, "lookahead": None}})
    monkeypatch.setitem(ADDED, "new.section", None)
    require_same_run(found, {**now, "new": {"section": None}})
