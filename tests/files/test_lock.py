"""One writer of a folder: who is refused, who is waited for, and who is known to be dead."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from vltrain.errors import InputError
from vltrain.files import lock as locks
from vltrain.files.lock import lock_beside, lock_inside, one_writer, writer_of

WRITES = (
    "import sys; from pathlib import Path; from vltrain.files.lock import *; f = Path(sys.argv[1])\nwith "
    "one_writer(lock_inside(f), f): print(1, flush=True); input()"
)


@pytest.fixture
def other(tmp_path):
    """A process that writes the folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, tmp_path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        yield child
        child.kill()


@pytest.fixture
def hasty(monkeypatch):
    for name, seconds in {
        "BEAT_SECONDS": 0.1,
        "STALE_SECONDS": 0.6,
        "POLL_SECONDS": 0.02,
        "TELL_SECONDS": 0.2,
        "SIGN_SECONDS": 0.1,
    }.items():
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def hold(folder: Path, **options):
    return one_writer(lock_inside(folder), folder, **options)


def signed(folder: Path, **changed) -> Path:
    """A lock file with the name of another writer in it, which nobody holds."""
    record = {
        "host": "node7",
        "place": "another boot",
        "pid": 4711,
        "start": "1",
        "since": 1.7e9,
        "command": "vltrain train --x",
        "token": "t",
    }
    path = lock_inside(folder)
    path.write_text(json.dumps({**record, **changed}))
    return path


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_the_second_is_told_by_whom(tmp_path, other):
    with pytest.raises(InputError) as refusal, hold(tmp_path, remedy="stand aside"):
        pass
    told = str(refusal.value)
    assert all(
        part in told
        for part in (
            str(tmp_path),
            f"pid {other.pid}",
            f"host {os.uname().nodename}",
            "since 20",
            "`-c ",
            "stand aside",
        )
    ), told
    assert writer_of(lock_inside(tmp_path)).pid == other.pid


def test_who_was_killed_is_taken_over_from(tmp_path, other, caplog):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert lock_inside(tmp_path).exists() and writer_of(lock_inside(tmp_path)) is None
    with hold(tmp_path):
        assert writer_of(lock_inside(tmp_path)).pid == os.getpid()
    assert f"pid {other.pid}" in caplog.text and "taken over" in caplog.text
    assert not any(tmp_path.iterdir())


def test_one_that_ends_is_waited_for_and_told(tmp_path, other, hasty, caplog):
    caplog.set_level(logging.WARNING)
    threading.Timer(0.7, other.stdin.close).start()
    with hold(tmp_path, wait_seconds=60) as waited:
        assert waited
    assert caplog.text.count(f"pid {other.pid}") >= 2  # told at once and again


def test_the_wait_has_an_end(tmp_path, other, hasty):
    with pytest.raises(InputError, match=f"pid {other.pid}"), hold(tmp_path, wait_seconds=0.3):
        pass


def test_a_thread_may_hold_it_again_and_another_may_not(tmp_path):
    refused = []

    def second():
        try:
            with hold(tmp_path):
                pass
        except InputError as error:
            refused.append(str(error))

    with hold(tmp_path):
        with hold(tmp_path):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"pid {os.getpid()}" in refused[0]


@pytest.mark.parametrize("locks_work", [True, False])
def test_one_at_a_time(tmp_path, hasty, monkeypatch, request, locks_work):
    if not locks_work:
        request.getfixturevalue("no_locks")
    inside, most = [], []

    def work():
        with hold(tmp_path, wait_seconds=60):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8 and not any(tmp_path.iterdir())


def test_another_machine_that_beats_is_refused_though_its_lock_does_not_reach_us(tmp_path, hasty):
    path, stop = signed(tmp_path), threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(path)

    beats = threading.Thread(target=beat)
    beats.start()
    try:
        with pytest.raises(InputError, match="host node7, pid 4711"), hold(tmp_path):
            pass
    finally:
        stop.set()
        beats.join()
    assert json.loads(path.read_text())["token"] == "t"


def test_another_machine_that_is_silent_is_taken_over_from(tmp_path, hasty, caplog):
    signed(tmp_path)
    with hold(tmp_path):
        pass
    assert "node7" in caplog.text and not any(tmp_path.iterdir())


def test_an_old_record_of_another_machine_costs_no_wait(tmp_path, monkeypatch):
    os.utime(signed(tmp_path), (1.7e9, 1.7e9))
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: pytest.fail("waited"))
    with hold(tmp_path):
        pass


def test_another_machine_whose_lock_outlives_it_is_refused_with_the_way_out(tmp_path, hasty):
    path = signed(tmp_path)
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=rf"node7.*silent for .*remove {path}"), hold(tmp_path):
            pass


def test_without_locks_the_living_is_refused_and_the_dead_taken_over_from(tmp_path, hasty, no_locks):
    me = {"place": locks._place(), "pid": os.getpid(), "start": locks.stat_of(os.getpid())[1]}
    signed(tmp_path, **me)
    with pytest.raises(InputError, match=f"pid {os.getpid()}"), hold(tmp_path):
        pass
    for dead in ({**me, "pid": dead_pid()}, {**me, "start": "1"}):  # the second: its number is another process's now
        signed(tmp_path, **dead)
        with hold(tmp_path):
            pass


def test_without_locks_another_machine_is_never_taken_over_from(tmp_path, hasty, no_locks):
    path = signed(tmp_path)
    os.utime(path, (1.7e9, 1.7e9))
    with pytest.raises(InputError, match=f"remove {path}"), hold(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}', "\x00" * 10])
def test_a_file_that_names_nobody_is_no_obstacle_unless_it_is_held(tmp_path, hasty, content):
    path = lock_inside(tmp_path)
    path.write_text(content)
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another program"), hold(tmp_path):
            pass
    with hold(tmp_path):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file/sub.*cannot be written"),
        one_writer(lock_beside(tmp_path / "file" / "sub"), tmp_path / "file" / "sub"),
    ):
        pass


def test_who_was_stopped_and_replaced_ends(tmp_path, other):
    """A process that comes back to a folder that is another's by now must not write on."""
    code = WRITES.replace("f = Path", "import vltrain.files.lock as m; m.BEAT_SECONDS = 0.05; f = Path")
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "mine"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.readline()
    signed(tmp_path / "mine")
    assert child.wait(timeout=20) == 2 and "node7" in child.stderr.read()
    child.stdin.close(), child.stdout.close(), child.stderr.close()
