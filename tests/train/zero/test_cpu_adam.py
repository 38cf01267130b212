"""A lock that a killed compilation has left behind stops nobody."""

import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from vltrain.train.zero import cpu_adam

LONG_AGO = 10_000.0
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"


def age(folder):
    for path in folder.iterdir():
        os.utime(path, (time.time() - LONG_AGO,) * 2)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder's lock as torch does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    age(tmp_path)
    yield process
    process.kill()
    process.wait()


def test_a_lock_left_behind_is_taken_away_and_told(tmp_path, holder, caplog):
    (tmp_path / "build.ninja").write_text("kept")
    holder.kill()
    holder.wait()
    age(tmp_path)
    cpu_adam.wait_for_builder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["build.ninja"]
    assert f"{tmp_path / 'lock'}: taken away" in caplog.text


def test_a_lock_that_is_held_is_waited_for(tmp_path, holder, monkeypatch, caplog):
    """However old it is; with a line that says for what."""
    monkeypatch.setattr(cpu_adam, "TOLD_AFTER_SECONDS", 0.2)
    waiting = threading.Thread(target=cpu_adam.wait_for_builder, args=(tmp_path,))
    with caplog.at_level(logging.WARNING):
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive() and (tmp_path / "lock").exists()
        assert caplog.text.count(f"waiting for {tmp_path / 'lock'}") == 1
        (tmp_path / "lock").unlink()  # as torch does at the end
        waiting.join(10)
    assert not waiting.is_alive() and "taken away" not in caplog.text


def test_a_lock_of_which_we_see_no_holder_is_waited_for_while_files_are_written(tmp_path, monkeypatch):
    """As from another machine with the same home."""
    (tmp_path / "lock").touch()
    age(tmp_path)
    (tmp_path / "cpu_adam.o").touch()
    started = time.monotonic()
    cpu_adam.wait_for_builder(tmp_path, untouched_seconds=1.0)
    assert time.monotonic() - started > 0.5 and not (tmp_path / "lock").exists()


def test_no_folder_of_a_build_waits_for_nothing(tmp_path):
    cpu_adam.wait_for_builder(tmp_path)
    cpu_adam.wait_for_builder(tmp_path / "missing")
