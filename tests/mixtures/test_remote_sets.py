"""Mixtures of which sets are at an address, on a real server of which reads fail and bytes are flipped, against the
same sets in folders."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.attacks.attack import run_vltrain
from tests.mixtures.sets import WEIGHTS, make_mixture
from tests.support.finished_run import finished_run
from tests.support.object_store import Faults, object_store
from tests.support.processes import run_ranks
from tests.support.tiny import IMAGE_SIZE, reblocked
from vltrain.config.recipe import dump_config
from vltrain.data.loader import StepLoader
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.remote import cache as cache_module
from vltrain.data.remote import packs as packs_module
from vltrain.data.remote import store as store_module
from vltrain.data.remote.cache import GIB, CacheSettings
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import SETS, MixedPacks, mixed, open_packed
from vltrain.errors import InputError
from vltrain.receipts.verify import prove

BLOCK, NUM_STEPS = 4096, 6
PART = 108_000  # bytes that the cache may hold
READER = SquareReader(size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """Sets of 48 and 20 packs in folders, in blocks of 4 KiB."""
    found = make_mixture(tmp_path_factory.mktemp("mixture"), red=48, blue=20)
    for one in found.sets.values():
        reblocked(one.folder, BLOCK)
    assert sum(path.stat().st_size for path in found.folder.parents[1].rglob("*-0*.arrow")) > 1.5 * PART
    return found


@pytest.fixture
def server(near):
    with object_store(near.folder.parents[1]) as store:
        yield store


@pytest.fixture(autouse=True)
def no_pauses_and_no_other_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "PAUSES", pauses := (0.0,) * 8)
    monkeypatch.setattr(packs_module, "PAUSES", pauses)
    monkeypatch.setattr(packs_module, "OPENING_PAUSES", (0.0,) * 3)
    monkeypatch.setattr(cache_module, "IN_MEMORY", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not-this-one"))
    yield
    assert not (tmp_path / "not-this-one" / "vltrain" / "packs").exists()


def far_mixture(server, tmp_path, names=("red", "blue"), num_bytes: int = 2**24) -> MixedPacks:
    """The same, of which those sets are at their addresses."""
    cache, root = CacheSettings(folder=str(tmp_path / "cache"), gib=num_bytes / GIB), server.folder
    sets = {
        name: PackedDataset(f"{server.address}/{name}/packed/train", cache=cache)
        if name in names
        else PackedDataset(root / name / "packed" / "train")
        for name in ("red", "blue")
    }
    found = mixed(tmp_path / "far", sets, "tokens", WEIGHTS, "repeat")
    found.write()
    return found


@pytest.mark.parametrize("names", [("red", "blue"), ("blue",)], ids="+".join)
def test_batches_are_those_of_the_folders_though_reads_fail_and_bytes_flip(near, server, tmp_path, names, monkeypatch):
    monkeypatch.setattr(packs_module, "TRIES", 20)  # four times in a row is not so rare here
    far = far_mixture(server, tmp_path, names, PART)
    assert far.manifest == near.manifest and far.folder.name == near.folder.name
    assert far.addresses == tuple(f"{server.address}/{name}/packed/train" for name in names)
    places = json.loads((far.folder / SETS).read_text())
    assert [name for name, place in places.items() if place.startswith("http://")] == list(names)
    plan = Plan(near.index, seed=1, epochs=0.5, packs_per_step=5, world_size=1, cost=PackCost())
    expected = [step.batches for step in StepLoader(near, plan, 0, READER, 0)]
    server.faults = Faults(fail=0.3, flip=0.3, only=("packs-", "images-"))
    opened = open_packed(far.folder, verify=False, cache=far.cache)
    for dataset in (opened, pickle.loads(pickle.dumps(far))):
        loader = StepLoader(dataset, plan, 0, READER, 0)
        found = [step.batches for step in loader]
        loader.close()
        for ours, theirs in zip(found, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
                assert torch.equal(one.pixels, other.pixels) and one.sample_ids == other.sample_ids
    assert server.failed.total() and server.flipped.total(), "the test tests nothing"


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"manifest.json": 404}, "not a folder of packed shards, or no such folder or bucket"),
        ({"manifest.json": 403}, "no rights to read it"),
        ({"images-00000.arrow": 404}, "images-00000.arrow: is not there"),
    ],
)
def test_a_set_whose_address_is_gone_or_without_rights_is_named(server, tmp_path, status, told):
    far = far_mixture(server, tmp_path, ("blue",))
    server.faults = Faults(status=status)
    with pytest.raises(InputError, match=f"^data.mixture.blue: {server.address}/blue/.*{told}") as error:
        open_packed(far.folder, cache=far.cache)
    assert "\n" not in str(error.value)


def test_a_set_that_vanishes_amid_training_is_named(server, tmp_path):
    far = far_mixture(server, tmp_path, ("blue",))
    server.faults = Faults(status={"packs-00000.arrow": 404})
    assert far.row(0).sample_ids[0].startswith("red/"), "the others are read as before"
    with pytest.raises(InputError, match=f"^data.mixture.blue: {server.address}/.*is not there .any more.*tried 9"):
        far.row(48)


def test_a_mixtures_own_folder_at_an_address_is_refused(near, server, tmp_path):
    with pytest.raises(InputError, match="found a mixture's folder.*name the address of each set"):
        PackedDataset(f"{server.address}/mixed/{near.folder.name}", cache=CacheSettings(folder=str(tmp_path)))


def test_checking_a_mixtures_data_reads_every_byte_at_its_addresses(near, tmp_path):
    shutil.copytree(near.folder.parents[1], tmp_path / "copy")
    with object_store(tmp_path / "copy") as store:
        far = far_mixture(store, tmp_path, ("red",))
        words, home = ["check", "data", far.folder], {"XDG_CACHE_HOME": str(tmp_path)}
        code, said = run_vltrain(words, env=home)
        assert code == 0 and "68 packs" in said and "every byte as it was packed" in said, said
        file = tmp_path / "copy" / "red" / "packed" / "train" / "images-00000.arrow"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
        code, said = run_vltrain(words, env=home)
        assert code == 1 and f"{store.address}/red/packed/train/images-00000.arrow: SHA-256 is" in said, said


def lives_of(names, near, far, tmp_path) -> None:
    """One process, one life after another: `whole` in folders, and on addresses `far`, `killed` and taken up, `moved`
    there from folders. The cache holds a part of the packs."""
    changes = {
        "train__packs_per_step": 3,
        "train__max_steps": NUM_STEPS,
        "train__epochs": 9.0,
        "train__save_every_steps": 2,
        "data__cache": far.cache.folder,
        "data__cache_gib": far.cache.gib,
    }
    lives = [("whole", near, {}), ("far", far, {}), ("killed", far, {"dies_at": 3}), ("killed", far, {})]
    lives += [("moved", near, {"dies_at": 3}), ("moved", far, {})]
    told = [
        {"name": name, "packs": str(packs.folder), "output": str(tmp_path / name), "changes": changes, "resume": True}
        | {"ds": {"zero_optimization": {"stage": 2}}}
        | more
        for name, packs, more in lives
        if name in names
    ]
    (tmp_path / "lives.json").write_text(json.dumps(told))
    run_ranks("tests.train.fault_worker", [str(tmp_path / "lives.json")], 1, tmp_path / "log")


@pytest.mark.parametrize("names", [["killed"], pytest.param(["far", "moved"], marks=pytest.mark.slow)], ids="+".join)
def test_training_is_bit_identical_killed_and_taken_up_too(near, server, tmp_path, names):
    far = far_mixture(server, tmp_path, num_bytes=PART)
    server.faults = Faults(places=4, only=("packs-", "images-"))
    lives_of(["whole", *names], near, far, tmp_path)
    assert server.failed.total() and server.flipped.total(), "the test tests nothing"
    expected = load_file(tmp_path / "whole" / "result.safetensors")
    for name in names:
        found = load_file(tmp_path / name / "result.safetensors")
        # a run that goes on counts the steps of its gradients anew
        kept = [key for key in expected if name == "far" or not key.startswith("gradient/")]
        assert len(kept) > 9 and [key for key in kept if not torch.equal(found[key], expected[key])] == [], name
        for file in ("log.jsonl", "history.bin"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (name, file)
    server.faults = Faults()
    assert prove(tmp_path / names[-1], near.folder, tmp_path / "whole").failures == []


@pytest.mark.slow
def test_a_recipe_of_sets_at_addresses_as_a_user_trains_it(tmp_path):
    places = finished_run(tmp_path / "here")
    shutil.rmtree(places.run)
    shutil.copytree(places.root / "packs", places.root / "other")
    with object_store(places.root) as store:
        for name, packs in (("near", str(places.root / "packs")), ("far", f"{store.address}/packs")):
            mixture = {"one": {"train_packs": packs, "weight": 2}, "two": {"train_packs": str(places.root / "other")}}
            settings = {"data__cache": str(tmp_path / "cache")} if name == "far" else {}
            config = places.config(
                data__root=str(places.root / name),
                data__mixture=mixture,
                data__train_packs=None,
                eval__scorer=None,
                output=str(tmp_path / name),
                **settings,
            )
            recipe = places.recipe.with_name(f"{name}.yaml")
            recipe.write_text(dump_config(config))
            code, said = run_vltrain(["train", "--recipe", recipe], process=True)
            assert code == 0, said[-3000:]
        code, said = run_vltrain(["plan", recipe])
        assert code == 0 and f"one: {store.address}/packs" in said, said
        packs = json.loads((tmp_path / "far" / "run.json").read_text())["data"]["packs"]
        words = ["check", "resume", tmp_path / "far", tmp_path / "near", "--packs", packs]
        code, said = run_vltrain(words, env={"XDG_CACHE_HOME": str(tmp_path)})
        assert code == 0, said
    for file in ("log.jsonl", "history.bin"):
        assert (tmp_path / "far" / file).read_bytes() == (tmp_path / "near" / file).read_bytes()
    for words in (["train", "--recipe", recipe, "--train.max_steps", "5"], ["plan", recipe]):
        code, said = run_vltrain(words, process=True)
        last = said.strip().rpartition("\n")[2]  # behind a warning that it is tried again
        assert code == 2 and last.startswith("error: data.mixture.one: http://") and "Traceback" not in said, said
