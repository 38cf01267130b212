"""Digests against hashlib over the bytes, and what makes the cache ask again."""

import hashlib
import os
import shutil
import threading
import time

import pytest
import xxhash

from vltrain.errors import InputError
from vltrain.files import digest
from vltrain.files.digest import file_digest, file_digests, files_below, folder_digest

BIG = 1 << 20  # remembered; less is read each time


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own; files made in a test count as old enough to be remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "SETTLED_NS", -1)
    return tmp_path / "cache" / "vltrain" / "digests"


@pytest.fixture
def reads(monkeypatch):
    """Which files were read."""
    seen = []
    whole = digest._read_digest
    monkeypatch.setattr(
        digest, "_read_digest", lambda algorithm, path: seen.append(os.path.basename(path)) or whole(algorithm, path)
    )
    return seen


def write(path, byte=b"a", size=BIG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(byte * size)
    return path


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_second_time_costs_a_stat_and_verify_reads(tmp_path, reads):
    path = write(tmp_path / "a")
    assert file_digest(path) == file_digest(path) == sha(path)
    assert reads == ["a"]
    assert file_digest(path, verify=True) == sha(path)
    assert reads == ["a", "a"]


@pytest.mark.parametrize("edit", ["size", "same size", "time put back", "renamed over"])
def test_an_edit_is_seen(tmp_path, edit):
    path = write(tmp_path / "a")
    before = path.stat()
    file_digest(path)
    if edit == "renamed over":
        os.replace(write(tmp_path / "b", b"b"), path)
    else:
        write(path, b"b", BIG + (edit == "size"))
    if edit in ("time put back", "renamed over"):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(path) == sha(path)


def test_what_changed_just_now_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digest, "SETTLED_NS", 2_000_000_000)
    path = write(tmp_path / "a")
    file_digest(path)
    file_digest(path)
    assert reads == ["a", "a"]


def test_a_folder_keeps_its_digest_where_it_goes(tmp_path):
    write(tmp_path / "one" / "x" / "a")
    write(tmp_path / "one" / "b", b"b", 3)
    whole = folder_digest(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "three")
    assert whole == folder_digest(tmp_path / "two") == folder_digest(str(tmp_path / "three") + "/")


@pytest.mark.parametrize("change", ["content", "name", "added", "removed", "swapped"])
def test_a_folder_is_another_with_any_change(tmp_path, change):
    a, b = write(tmp_path / "one" / "a", b"a", 5), write(tmp_path / "one" / "x" / "b", b"b", 5)
    before = folder_digest(tmp_path / "one")
    match change:
        case "content":
            a.write_bytes(b"c")
        case "name":
            a.rename(a.with_name("c"))
        case "added":
            write(tmp_path / "one" / "empty", size=0)
        case "removed":
            b.unlink()
        case "swapped":
            a.write_bytes(b"b" * 5)
            b.write_bytes(b"a" * 5)
    assert folder_digest(tmp_path / "one") != before


def test_patterns_choose_what_counts(tmp_path):
    write(tmp_path / "one" / "a.bin", size=5)
    before = folder_digest(tmp_path / "one", ("*.bin",))
    write(tmp_path / "one" / "notes.txt", size=5)
    assert folder_digest(tmp_path / "one", ("*.bin",)) == before != folder_digest(tmp_path / "one")


def test_links_are_followed_and_a_circle_ends(tmp_path):
    write(tmp_path / "store" / "blob", size=5)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "weights").symlink_to(tmp_path / "store" / "blob")
    (tmp_path / "one" / "self").symlink_to(tmp_path / "one")
    assert files_below(tmp_path / "one") == ["weights"]
    before = folder_digest(tmp_path / "one")
    write(tmp_path / "store" / "blob", b"b", 5)
    assert folder_digest(tmp_path / "one") != before


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "dangling"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=str(path)):
        file_digest(path)


@pytest.mark.parametrize("state", ["a file", "garbage", "no home"])
def test_without_a_cache_files_are_read(tmp_path, cache, state, monkeypatch, reads):
    path = write(tmp_path / "a")
    if state == "a file":
        write(tmp_path / "cache", size=1)
    elif state == "garbage":
        file_digest(path)
        for entries in cache.iterdir():
            entries.write_bytes(b"\x93NUMPY\x01\x00garbage")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    reads.clear()
    assert file_digest(path) == sha(path)
    assert reads == ["a"]


def test_algorithms_are_remembered_apart(tmp_path, reads):
    path = write(tmp_path / "a")
    for _ in range(2):
        assert file_digests([path], algorithm="xxh3_128") == [xxhash.xxh3_128(path.read_bytes()).hexdigest()]
        assert file_digest(path) == sha(path)
    assert reads == ["a", "a"]


def test_writers_at_once_leave_whole_entries(tmp_path, cache):
    paths = [write(tmp_path / f"{number}", bytes([number])) for number in range(8)]
    threads = [threading.Thread(target=file_digest, args=(path,)) for path in paths * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file_digests(paths) == [sha(path) for path in paths]
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_entries_replace_those_of_the_same_file(tmp_path, cache):
    for byte in (b"a", b"b", b"c"):
        time.sleep(0.01)
        file_digest(write(tmp_path / "a", byte))
    (entries,) = cache.iterdir()
    assert len(digest._read(str(entries), "sha256")) == 1
