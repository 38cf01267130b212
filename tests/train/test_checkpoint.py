"""Checkpoints on disk: whole or not there, verified before use, and never mistaken for another model's."""

import json
import random
import shutil

import pytest
import torch

from vltrain.errors import InputError
from vltrain.train import checkpoint as checkpoints
from vltrain.train.checkpoint import load_trainable, newest_checkpoint, open_checkpoint, require_same_run, save_checkpoint

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
