"""Files that a run writes to all the time, on a disk that is full: named in one line."""

import ctypes
import os
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from vltrain.data import folder as folders
from vltrain.data.folder import new_folder
from vltrain.errors import InputError
from vltrain.files.appended import AppendedFile
from vltrain.files.atomic import write_json, write_whole


def fill(folder):
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_lines_and_whole_files(small_disk):
    lines = AppendedFile(small_disk / "log.jsonl")
    lines.write("one\n")
    write_json(small_disk / "run.json", {"a": 1})
    fill(small_disk)
    with pytest.raises(InputError, match="log.jsonl: cannot be written .No space left"):
        for _ in range(10):
            lines.write("x" * 1000 + "\n")
    lines.close()
    with pytest.raises(InputError, match="run.json: could not be written .No space left"):
        write_whole(small_disk / "run.json", "x" * 100_000)
    assert (small_disk / "run.json").read_text() == '{\n  "a": 1\n}\n' and not list(small_disk.glob(".run.json*"))


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    for call in (
        lambda: AppendedFile(tmp_path / "log.jsonl"),
        lambda: write_whole(tmp_path / "log.jsonl", "x"),
    ):
        with pytest.raises(InputError, match="written"):
            call()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_folder_of_files_of_many_writers_has_one_mode(tmp_path, umask):
    """safetensors' temporary file, a copy of something read-only, and a file of ours."""
    (tmp_path / "read-only").write_text("x")
    (tmp_path / "read-only").chmod(0o400)
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "images").mkdir()
            shutil.copy(tmp_path / "read-only", folder / "images" / "a.png")
            save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
            (folder / "ours.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) == 3 and set(modes.values()) == {0o666 & ~umask}


def test_many_files_are_flushed_with_their_file_system(tmp_path, monkeypatch):
    """One by one where the system has no such call."""
    flushed, libc = [], ctypes.CDLL(None, use_errno=True)
    monkeypatch.setattr(folders, "_MANY", 3)
    monkeypatch.setattr(folders, "sync", flushed.append)
    for name, has_call in (("at once", True), ("one by one", False)):
        flushed.clear()
        monkeypatch.setattr(
            folders.ctypes, "CDLL", (lambda *_, **__: libc) if has_call else (lambda *_, **__: object())
        )
        with folders.new_folder(tmp_path / name) as folder:
            for number in range(4):
                (folder / str(number)).write_text("x")
        assert len(list((tmp_path / name).iterdir())) == 4
        assert len(flushed) == (1 if has_call else 6), "the parent alone; or each file, the folder and the parent"
