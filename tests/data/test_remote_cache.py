"""The cache of blocks and sets that processes share: its bound, what goes first, and what stays."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.data.test_remote import BLOCK, cached, settings, wait_for
from tests.support.processes import ROOT
from vltrain.data.remote import cache as cache_module
from vltrain.data.remote.cache import BlockCache, OpenSet
from vltrain.errors import InputError


def fill(cache: BlockCache, numbers, num_bytes: int = BLOCK, used_at: int | None = None) -> None:
    """Blocks that say their number; `used_at`: in s."""
    for number in numbers:
        data = number.to_bytes(4, "little") * (num_bytes // 4)
        digest = hashlib.sha256(data).digest()
        assert cache.read(digest, num_bytes, lambda: data) == data
        if used_at is not None:
            path = cache.folder / "blocks" / digest.hex()[:2] / digest.hex()
            os.utime(path, (used_at, used_at))


def held(cache: BlockCache) -> set[int]:
    return {
        int.from_bytes(path.read_bytes()[:4], "little")
        for path in (cache.folder / "blocks").rglob("*")
        if path.is_file()
    }


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path):
    cache = BlockCache(settings(tmp_path, 20 * BLOCK))
    fill(cache, range(20), used_at=1000)
    fill(cache, range(5), used_at=2000)
    cache = BlockCache(settings(tmp_path, 20 * BLOCK))  # what is in memory does not count
    digest = hashlib.sha256((7).to_bytes(4, "little") * (BLOCK // 4)).digest()
    cache.keep(digest, BLOCK, lambda: pytest.fail("it is there"))  # as fetching ahead does
    assert cache.size() == 20 * BLOCK
    fill(cache, [20])
    assert cache.size() <= 20 * BLOCK and {0, 1, 2, 3, 4, 7, 20} <= held(cache) and len(held(cache)) == 18
    fill(cache, range(21, 300))
    assert cache.size() == len(held(cache)) * BLOCK <= 20 * BLOCK


def test_a_lost_count_and_what_a_killed_process_had_begun_are_put_right(tmp_path):
    cache = BlockCache(settings(tmp_path, 10 * BLOCK))
    fill(cache, range(6))
    begun = cache.folder / "blocks" / "00" / f".{'00' * 32}.{BLOCK}.dead0000.tmp"
    begun.parent.mkdir(exist_ok=True)
    begun.write_bytes(b"half")
    (cache.folder / "size").write_text("")  # killed while it was written
    assert cache.size() == 6 * BLOCK and not begun.exists()
    (cache.folder / "size").write_text(str(9 * BLOCK))  # killed between counting and writing
    fill(cache, range(6, 9))
    assert cache.size() == 9 * BLOCK and held(cache) == set(range(9))


PROCESS = """
import hashlib, random, sys, time
from vltrain.data.remote.cache import GIB, BlockCache, CacheSettings
folder, seed, log = sys.argv[1:]
cache = BlockCache(CacheSettings(folder=folder, gib=24 * 4096 / GIB))
chance = random.Random(int(seed))
def fetch():
    with open(log, "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.002)
    return data
print("ready", flush=True)
for _ in range(int(sys.stdin.readline())):
    number = chance.randrange(16)
    data = number.to_bytes(4, "little") * 1024
    (cache.read if chance.random() < 0.5 else cache.keep)(hashlib.sha256(data).digest(), 4096, fetch)
    cache._memory.clear()
print("done", flush=True)
"""


def start(tmp_path, seed: int) -> subprocess.Popen:
    words = [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(seed), str(tmp_path / "fetched")]
    return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_cache_and_fetch_each_block_once_killed_ones_leave_nothing_whole(tmp_path):
    three = [start(tmp_path, seed) for seed in range(3)]
    for process in three:
        assert process.stdout.readline() == "ready\n"
    for process, rounds in zip(three, (200, 200, 10**6), strict=True):
        process.stdin.write(f"{rounds}\n")
        process.stdin.flush()
    wait_for(lambda: (tmp_path / "fetched").exists())
    time.sleep(0.02)
    three[2].send_signal(signal.SIGKILL)
    for process in three[:2]:
        assert process.communicate(timeout=60)[0] == "done\n" and process.returncode == 0
    three[2].communicate()
    fetched = (tmp_path / "fetched").read_text().split()
    assert set(fetched) == set(map(str, range(16))) and len(fetched) <= 17, "one that was killed amid its fetch at most"
    cache = BlockCache(settings(tmp_path, 24 * BLOCK))
    for path in cached(tmp_path):
        assert path.name.endswith(".tmp") or hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    fill(cache, range(100, 140))  # makes room, and so removes what was begun
    assert not [path for path in cached(tmp_path) if path.name.endswith(".tmp")]
    assert cache.size() == len(cached(tmp_path)) * BLOCK <= 24 * BLOCK


def put_set(cache: BlockCache, name: str, num_bytes: int, opened_at: int | None = None) -> OpenSet:
    """An open set with one file. `opened_at`: in s."""
    place = cache.open_set(name)
    with cache.filling(place):
        cache.put(place.folder / "index.arrow", name.encode() * (num_bytes // len(name)))
    if opened_at is not None:
        os.utime(place.folder / cache_module.USED, (opened_at, opened_at))
    return place


def sets_in(cache: BlockCache) -> set[str]:
    return {path.name for path in (cache.folder / "sets").iterdir()}


def test_sets_count_and_those_that_nobody_reads_go_those_opened_longest_ago_first(tmp_path):
    cache = BlockCache(settings(tmp_path, 20 * BLOCK))
    read = put_set(cache, "read", 4 * BLOCK, opened_at=500)
    for name, num_blocks, opened_at in (("next", 2, 3000), ("aged", 3, 1000), ("anew", 2, 2000)):
        put_set(cache, name, num_blocks * BLOCK, opened_at)
    cache.open_set("anew")  # now
    fill(cache, range(5), used_at=4000)
    fill(cache, range(5, 9))
    assert cache.size() == 20 * BLOCK and len(sets_in(cache)) == 4
    fill(cache, [9])
    assert sets_in(cache) == {"read", "next", "anew"} and len(held(cache)) == 10 and cache.size() == 18 * BLOCK
    fill(cache, range(10, 13))
    assert sets_in(cache) == {"read", "anew"} and len(held(cache)) == 12 and held(cache) >= set(range(5, 13))
    fill(cache, range(13, 100))
    assert sets_in(cache) == {"read"} and cache.size() <= 20 * BLOCK
    assert (read.folder / "index.arrow").stat().st_size == 4 * BLOCK
    with pytest.raises(InputError, match=r"data.cache_gib: found .* 4 blocks .* and 0\.0156 MiB of what is read"):
        BlockCache(settings(tmp_path, 8 * BLOCK - 1)).require_room(BLOCK, 100 * BLOCK, 1)
    del read
    fill(cache, range(100, 120))
    assert sets_in(cache) == set()


READER_OF_SETS = """
import random, sys
from pathlib import Path
from vltrain.data.remote.cache import GIB, BlockCache, CacheSettings
folder, seed = sys.argv[1:]
cache = BlockCache(CacheSettings(folder=folder, gib=24 * 4096 / GIB))
chance = random.Random(int(seed))
own, fetched = cache.open_set(f"own-{seed}"), 0
with cache.filling(own):
    cache.put(own.folder / "index.arrow", b"own" * 1000)
print("ready", flush=True)
for round in range(int(sys.stdin.readline())):
    place = cache.open_set(f"set-{chance.randrange(6)}")
    index = place.folder / "index.arrow"
    with cache.filling(place):
        if not index.is_file():
            fetched += 1
            cache.put(index, place.folder.name.encode() * 1500)
    for number in range(chance.randrange(4)):
        digest = bytes([int(seed), number]) + round.to_bytes(30, "little")
        cache.keep(digest, 4096, lambda: bytes(4096))
    assert index.read_bytes() == place.folder.name.encode() * 1500, "it went while it was read"
    assert (own.folder / "index.arrow").read_bytes() == b"own" * 1000
del place
print(fetched, flush=True)
sys.stdin.readline()
"""


def test_processes_open_fill_and_remove_sets_and_what_one_reads_stays(tmp_path):
    words = [sys.executable, "-c", READER_OF_SETS, str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    two = [subprocess.Popen([*words, str(seed)], **pipes) for seed in range(2)]
    for process in two:
        assert process.stdout.readline() == "ready\n"
    for process in two:
        process.stdin.write("80\n")
        process.stdin.flush()
    fetched = [int(process.stdout.readline()) for process in two]
    assert min(fetched) > 3, "none was removed, so the test tests nothing"
    cache = BlockCache(settings(tmp_path, 24 * BLOCK))
    fill(cache, range(100))
    assert sets_in(cache) >= {"own-0", "own-1"} and cache.size() <= 24 * BLOCK
    two[1].send_signal(signal.SIGKILL)
    two[1].communicate()
    fill(cache, range(100, 200))
    assert sets_in(cache) == {"own-0"}, "a killed process holds none"
    assert two[0].communicate("\n", timeout=60) is not None and two[0].returncode == 0
