"""Packs at an address against the same packs in a folder, over a real HTTP server that fails, lies, hangs and
refuses."""

import gc
import hashlib
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.object_store import Faults, object_store
from tests.support.tiny import IMAGE_SIZE, make_segments, reblocked, write_packs
from vltrain.data.loader import StepLoader
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.remote import ahead as ahead_module
from vltrain.data.remote import cache as cache_module
from vltrain.data.remote import packs as packs_module
from vltrain.data.remote import store as store_module
from vltrain.data.remote.ahead import Ahead
from vltrain.data.remote.cache import GIB, BlockCache, CacheSettings
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError

NUM_PACKS, BLOCK = 40, 4096
READER = SquareReader(size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Packs of 120 kB, in blocks of 4 KiB."""
    return reblocked(write_packs(tmp_path_factory.mktemp("remote") / "packs", make_segments(NUM_PACKS)), BLOCK)


@pytest.fixture
def server(folder):
    with object_store(folder.parent) as store:
        yield store


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(store_module, "PAUSES", pauses := (0.0,) * 8)
    monkeypatch.setattr(packs_module, "PAUSES", pauses)
    monkeypatch.setattr(cache_module, "IN_MEMORY", 2)
    monkeypatch.setattr(packs_module, "OPENING_PAUSES", (0.0,) * 3)


def settings(tmp_path, num_bytes: int = 2**24) -> CacheSettings:
    return CacheSettings(folder=str(tmp_path / "cache"), gib=num_bytes / GIB)


def cached(tmp_path) -> list[Path]:
    return [path for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file()]


def wait_for(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_same(far: PackedDataset, near: PackedDataset) -> None:
    assert far.manifest == near.manifest and len(far) == len(near)
    for name, values in vars(near.index).items():
        assert np.array_equal(values, getattr(far.index, name))
    for number in range(len(near)):
        expected, found = vars(near.row(number)), vars(far.row(number))
        for name, value in expected.items():
            assert np.array_equal(value, found[name]) and getattr(value, "dtype", 0) == getattr(found[name], "dtype", 0)
        assert far.sample_ids(number) == near.sample_ids(number)
    for number in range(near.manifest.num_images):
        assert far.image(number) == near.image(number)


def test_packs_at_an_address_are_those_in_the_folder_and_are_fetched_once(folder, server, tmp_path):
    far = PackedDataset(f"{server.address}/packs/", cache=settings(tmp_path))
    assert_same(far, PackedDataset(folder))
    asked = sum(server.requests.values())
    assert_same(PackedDataset(f"{server.address}/packs", cache=settings(tmp_path)), PackedDataset(folder))
    again = sum(server.requests.values()) - asked
    assert again <= 5, "the manifest, the record and the shards' ends; everything else is in the cache"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    fetched = sum(path.stat().st_size for path in cached(tmp_path))
    assert fetched <= sizes["packs-00000.arrow"] + sizes["images-00000.arrow"]


def test_one_pack_fetches_its_own_blocks_only(folder, server, tmp_path):
    far = PackedDataset(f"{server.address}/packs", cache=settings(tmp_path))
    kept = far.keep(0)
    images = sum(len(far.image(number)) for number in far.row(0).image_ids.tolist())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    whole = sizes["images-00000.arrow"]
    fetched = sum(path.stat().st_size for path in cached(tmp_path))
    assert images < fetched <= kept + 2 * BLOCK and fetched < whole / 4 + sizes["packs-00000.arrow"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_are_those_of_the_folder_with_reads_failing_and_bytes_flipped(
    folder, server, tmp_path, workers, monkeypatch
):
    monkeypatch.setattr(packs_module, "TRIES", 20)  # in this process alone: four times in a row is not so rare here
    near = PackedDataset(folder)
    plan = Plan(near.index, seed=1, epochs=2.0, packs_per_step=5, world_size=1, cost=PackCost())
    server.faults = Faults(fail=0.1, flip=0.02 if workers else 0.2, only=("packs-", "images-"))
    # a tenth of the data fits in
    far = PackedDataset(f"{server.address}/packs", verify=False, cache=settings(tmp_path, 5 * BLOCK))
    loader = StepLoader(far, plan, 0, READER, workers)
    expected = [step.batches for step in StepLoader(near, plan, 0, READER, 0)]
    found = [step.batches for step in loader]
    loader.close()
    wait_for(lambda: not any(thread.name == "fetch ahead" for thread in threading.enumerate()))
    assert len(found) == len(expected) == 16
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
            assert torch.equal(one.pixels, other.pixels) and one.sample_ids == other.sample_ids
    assert server.failed.total() > 5 and server.flipped.total() > (0 if workers else 10)
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= 5 * BLOCK


def test_bytes_that_stay_flipped_are_named_with_both_digests(folder, server, tmp_path):
    far = PackedDataset(f"{server.address}/packs", cache=settings(tmp_path))
    server.faults = Faults(flip=1.0, only=("images-",))
    with pytest.raises(InputError, match="images-00000.arrow: bytes 0 to 4096 are damaged") as told:
        far.image(0)
    whole = (folder / "images-00000.arrow").read_bytes()
    assert hashlib.sha256(whole[:BLOCK]).hexdigest() in str(told.value) and "4 times" in str(told.value)
    server.faults = Faults()
    assert far.image(0) == PackedDataset(folder).image(0), "nothing damaged was kept"


def test_an_object_that_vanishes_is_asked_for_again_and_then_named(folder, server, tmp_path):
    far = PackedDataset(f"{server.address}/packs", cache=settings(tmp_path))
    server.faults = Faults(status={"images-00000.arrow": 404})
    asked = server.requests["images-00000.arrow"]
    with pytest.raises(InputError, match="images-00000.arrow: is not there.* tried 9 times"):
        far.image(0)
    assert server.requests["images-00000.arrow"] == asked + 9
    server.faults = Faults()
    assert far.image(0) == PackedDataset(folder).image(0)


def test_a_read_that_hangs_ends(folder, server, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(packs_module, "PAUSES", (0.0,))
    far = PackedDataset(f"{server.address}/packs", cache=settings(tmp_path))
    server.faults = Faults(hang={"images-00000.arrow"})
    with pytest.raises(InputError, match="nothing came within 0.2 s"):
        far.image(0)


def test_a_block_that_was_damaged_or_cut_in_the_cache_is_fetched_again(folder, server, tmp_path, caplog):
    near = PackedDataset(folder)
    PackedDataset(f"{server.address}/packs", cache=settings(tmp_path)).image(0)
    for damage in (lambda data: data[:-1], lambda data: b"", lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:]):
        for path in cached(tmp_path):
            path.write_bytes(damage(path.read_bytes()))
        assert PackedDataset(f"{server.address}/packs", cache=settings(tmp_path)).image(0) == near.image(0)
        assert "is damaged, fetched again" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (Faults(status={"manifest.json": 403}), "manifest.json: no rights to read it .*403.*credentials"),
        (Faults(status={"images-00000.arrow": 401}), "images-00000.arrow: no rights to read it"),
        (Faults(status={"manifest.json": 404}), "not a folder of packed shards, or no such folder or bucket"),
        (Faults(status={"packs-00000.arrow": 404}), "packs-00000.arrow: is not there; copy the folder anew"),
        (Faults(status={"blocks.index": 404}), "blocks.index: is not there: packs that go to an address have it"),
        (Faults(ranges=False), "answers ranges with whole objects"),
        (Faults(fail=1.0), r"manifest.json: cannot be read \(.*tried 4 times"),
        (Faults(flip=1.0, only=("index.arrow",)), "index.arrow: arrived damaged 4 times"),
        (Faults(flip=1.0, only=("manifest.json",)), "manifest.json:"),
        (Faults(flip=1.0, only=("blocks.index",)), "blocks.index: "),
    ],
    ids=lambda value: None if isinstance(value, Faults) else value[:24],
)
def test_an_address_that_cannot_be_opened_is_refused_in_a_line(folder, server, tmp_path, faults, told):
    server.faults = faults
    with pytest.raises(InputError, match=told) as error:
        PackedDataset(f"{server.address}/packs", cache=settings(tmp_path))
    assert server.address in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s4://bucket/packs", "unknown protocol 's4'; did you mean 's3'"),
        ("abfs://bucket/packs", "takes a package that is not installed here; pip install adlfs"),
        ("http://user:secret@127.0.0.1/packs", "holds a password"),
        ("simplecache::http://127.0.0.1/packs", "expected PROTOCOL://FOLDER"),
        ("memory://nowhere/packs", "not a folder of packed shards, or no such folder or bucket"),
    ],
)
def test_an_address_that_is_none_is_refused_in_a_line(address, told, tmp_path):
    with pytest.raises(InputError, match=told) as error:
        PackedDataset(address, cache=settings(tmp_path))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("left", [-1, 0, 5000])
def test_a_shard_that_was_cut_short_is_refused_when_it_opens(folder, tmp_path, left):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "packs-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:left])
    with object_store(tmp_path) as store, pytest.raises(InputError, match="packs-00000.arrow: "):
        PackedDataset(f"{store.address}/{copy.name}", cache=settings(tmp_path))


def test_a_cache_that_cannot_hold_or_be_written_is_refused(folder, server, tmp_path, monkeypatch):
    address = f"{server.address}/packs"
    with pytest.raises(InputError, match="data.cache_gib: found .* expected at least"):
        PackedDataset(address, cache=settings(tmp_path, 4 * BLOCK - 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="for each of 2 rank"):
        PackedDataset(address, cache=settings(tmp_path, 4 * BLOCK))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="data.cache: .*file.*cannot be written"):
        PackedDataset(address, cache=CacheSettings(folder=str(tmp_path / "file" / "cache")))
    free = shutil.disk_usage(tmp_path)._replace(free=BLOCK)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match="data.cache_gib: .* its disk has"):
        PackedDataset(address, cache=CacheSettings(folder=str(tmp_path / "other")))


def test_packs_whose_set_went_are_opened_anew(folder, server, tmp_path):
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.json")) + sum(
        (folder / name).stat().st_size for name in ("index.arrow", "blocks.index")
    )
    bound = settings(tmp_path, num_bytes + 6 * BLOCK)
    far = PackedDataset(f"{server.address}/packs", cache=bound)
    cache = BlockCache(bound)
    assert num_bytes <= cache.size() < num_bytes + BLOCK, "the ends of shards are read without the cache"
    there = pickle.loads(pickle.dumps(far))  # as a worker process gets it
    for number in range(40):
        if number == 20:
            assert there.image(0) == PackedDataset(folder).image(0) and any((cache.folder / "sets").iterdir())
            del far, there
            gc.collect()
        cache.keep(number.to_bytes(32, "little"), BLOCK, lambda: bytes(BLOCK))
    assert not any((cache.folder / "sets").iterdir())
    assert_same(PackedDataset(f"{server.address}/packs", cache=bound), PackedDataset(folder))


def test_fetching_ahead_is_bounded_and_goes_on_as_packs_are_used(monkeypatch):
    kept: list[int] = []

    def keep(pack: int) -> int:
        kept.append(pack)
        if pack == 3:
            raise InputError("whoever uses it meets this")
        return 100

    ahead = Ahead(iter(range(1000)), keep, most_bytes=10**9)
    wait_for(lambda: len(kept) >= ahead_module.MOST_PACKS)
    time.sleep(0.05)
    assert sorted(kept) == list(range(ahead_module.MOST_PACKS))
    ahead.used(2)
    ahead.used(3)
    wait_for(lambda: len(kept) == ahead_module.MOST_PACKS + 5)
    ahead.close()
    time.sleep(0.05)
    ahead.used(1)
    assert len(kept) == ahead_module.MOST_PACKS + 5

    kept.clear()
    ahead = Ahead(iter(range(1000)), keep, most_bytes=1000)
    wait_for(lambda: len(kept) >= 10)
    time.sleep(0.05)
    assert len(kept) <= 10 + ahead_module.THREADS
    ahead.close()


def test_a_loader_at_an_address_has_the_next_packs_before_they_are_asked_for(folder, server, tmp_path):
    far = PackedDataset(f"{server.address}/packs", cache=settings(tmp_path))
    plan = Plan(far.index, seed=1, epochs=1.0, packs_per_step=5, world_size=1, cost=PackCost())
    loader = StepLoader(far, plan, 0, READER, 0)
    steps = iter(loader)
    next(steps)
    near = PackedDataset(folder)
    images = {image for step in range(8) for pack in plan.packs_of(step).tolist() for image in near.row(pack).image_ids}
    size = sum(path.stat().st_size for path in folder.glob("*-00000.arrow"))
    wait_for(lambda: sum(path.stat().st_size for path in cached(tmp_path)) > 0.999 * size)
    assert len(images) == near.manifest.num_images
    server.faults = Faults(status={"packs-00000.arrow": 404, "images-00000.arrow": 404})
    assert [step.step for step in steps] == list(range(1, 8)), "nothing is asked for any more"
    loader.close()
