"""Data that several processes need is made by one; the others wait for it, and not for ever."""

import logging
import threading
import time

import pytest

from vltrain.data.folder import new_folder
from vltrain.errors import InputError
from vltrain.files import lock as locks
from vltrain.files.lock import lock_beside, one_writer
from vltrain.prepared import made_once as module
from vltrain.prepared.made_once import made_once


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, seconds in {
        "POLL_SECONDS": 0.02,
        "LOOK_SECONDS": 0.02,
        "UNSEEN_SECONDS": 0.3,
        "GONE_SECONDS": 0.3,
        "TELL_SECONDS": 0.1,
    }.items():
        monkeypatch.setattr(module, name, seconds)
    for name, seconds in {"POLL_SECONDS": 0.02, "TELL_SECONDS": 0.1}.items():
        monkeypatch.setattr(locks, name, seconds)


def fill(folder, word="mine", seconds=0.0):
    with new_folder(folder) as temporary:
        time.sleep(seconds)
        (temporary / "word").write_text(word)


def test_the_second_of_two_first_runs_uses_what_the_first_made(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    result, began = tmp_path / "new" / "samples", threading.Event()

    def first():
        began.set()
        fill(result, "first", 0.4)

    thread = threading.Thread(target=made_once, args=(first, result), kwargs={"remedy": "-"})
    thread.start()
    began.wait(10)
    made_once(lambda: pytest.fail("made twice"), result, remedy="-")
    thread.join()
    assert (result / "word").read_text() == "first" and [path.name for path in result.parent.iterdir()] == ["samples"]
    assert "waiting for" in caplog.text and "is there meanwhile, and is used" in caplog.text


def test_the_second_makes_it_where_the_first_has_failed(tmp_path):
    result, began = tmp_path / "samples", threading.Event()

    def fails():
        began.set()
        time.sleep(0.3)
        raise InputError("no data")

    def first():
        with pytest.raises(InputError, match="no data"):
            made_once(fails, result, remedy="-")

    thread = threading.Thread(target=first)
    thread.start()
    began.wait(10)
    made_once(lambda: fill(result, "second"), result, remedy="-")
    thread.join()
    assert (result / "word").read_text() == "second"


def test_another_rank_waits_while_there_are_signs_of_life(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    result = tmp_path / "samples"

    def rank_0():
        with one_writer(lock_beside(result), result):
            time.sleep(1.0)  # longer than a rank that gives no sign may take
            fill(result)

    thread = threading.Thread(target=rank_0)
    thread.start()
    made_once(lambda: pytest.fail("made by rank 1"), result, remedy="-")
    thread.join()
    assert (result / "word").read_text() == "mine" and "waiting for" in caplog.text


@pytest.mark.parametrize("began", [False, True])
def test_another_rank_does_not_wait_for_one_that_never_came_or_has_gone(tmp_path, monkeypatch, began):
    monkeypatch.setenv("RANK", "1")
    result = tmp_path / "samples"
    if began:
        with one_writer(lock_beside(result), result):
            pass
    with pytest.raises(InputError, match="samples: nobody has made it.*rank 0 has ended"):
        made_once(lambda: pytest.fail("made by rank 1"), result, remedy="-")


def test_a_writer_that_lives_for_ever_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.5)
    result, over = tmp_path / "samples", threading.Event()

    def endless():
        with one_writer(lock_beside(result), result):
            over.wait(60)

    thread = threading.Thread(target=endless)
    thread.start()
    while not lock_beside(result).exists():
        time.sleep(0.01)
    try:
        with pytest.raises(InputError, match="writes there"):
            made_once(lambda: pytest.fail("made"), result, remedy="-")
        monkeypatch.setenv("RANK", "2")
        with pytest.raises(InputError, match="nobody has made it"):
            made_once(lambda: pytest.fail("made"), result, remedy="-")
    finally:
        over.set()
        thread.join()
