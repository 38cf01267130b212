"""A hanging rank is named by the others: one that is behind, one that is gone, or none; and by itself, where it is
alone."""

import threading
import time

import pytest

from vltrain.distributed.watchdog import Watchdog

TIMEOUT = 0.4


def run_ranks_of_one_process(folder, places, silent=()):
    """Watchdogs of ranks that have come to `places` and stay there. Returns {rank: what it said}."""
    said, threads = {}, []
    done = threading.Barrier(len(places) - len(silent))

    def rank_lives(rank, place):
        dog = Watchdog(
            folder,
            rank=rank,
            world_size=len(places),
            timeout_seconds=TIMEOUT,
            end=lambda text: said.__setitem__(rank, text),
        )
        with dog.watching():
            dog.at(*place)
            if rank in silent:
                time.sleep(0.1)
                dog._stop.set()  # its process stops: no sign of life, but its file stays
                dog._file = lambda _: folder / "nowhere"
                return
            while rank not in said and time.monotonic() < deadline:
                time.sleep(0.02)
            done.wait(5)

    deadline = time.monotonic() + 10
    for rank, place in enumerate(places):
        threads.append(threading.Thread(target=rank_lives, args=(rank, place)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return said


def test_the_rank_that_is_behind_is_named_by_all(tmp_path):
    said = run_ranks_of_one_process(tmp_path, [(7, "backward", 1), (7, "forward", 1), (7, "backward", 1)])
    assert said.keys() == {0, 1, 2}
    assert all("the others wait for rank 1, which hangs at step 7 (forward)" in text for text in said.values())
    assert "_watch" in (tmp_path / "ranks" / "0.stacks").read_text()


def test_a_rank_without_a_sign_of_life_is_named(tmp_path):
    said = run_ranks_of_one_process(tmp_path, [(3, "update", 2), (3, "forward", 0)], silent=(1,))
    assert "no heartbeat from rank 1, last at step 3 (forward)" in said[0]


def test_all_at_one_place(tmp_path):
    assert "all ranks are at step 5 (update)" in run_ranks_of_one_process(tmp_path, [(5, "update"), (5, "update")])[0]


@pytest.mark.parametrize("phase", ["save", "evaluate"])
def test_what_may_take_long_is_not_a_hang(tmp_path, phase):
    said = []
    with (dog := Watchdog(tmp_path, rank=0, world_size=2, timeout_seconds=0.1, end=said.append)).watching():
        dog.at(4, phase)
        time.sleep(0.4)
    assert said == [] and not (tmp_path / "ranks" / "0.json").exists()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ((4, "fetch"), "step 4 hangs (fetch): the image workers deliver nothing"),
        ((0, "forward"), "0.stacks shows where"),
        ((4, "save"), "step 4 hangs (save)"),
    ],
)
def test_a_rank_alone_ends_too(tmp_path, place, told):
    said = []
    with (dog := Watchdog(tmp_path, rank=0, world_size=1, timeout_seconds=0.05, end=said.append)).watching():
        dog.at(*place)
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert told in said[0] and "train.hang_timeout_minutes" in said[0]
    assert (tmp_path / "ranks" / "0.stacks").exists()


def test_progress_of_an_evaluation_is_a_sign_of_life(tmp_path):
    said = []
    with (dog := Watchdog(tmp_path, rank=0, world_size=1, timeout_seconds=0.05, end=said.append)).watching():
        dog.at(4, "evaluate")
        for _ in range(8):
            time.sleep(0.1)
            dog.goes_on()
    assert said == []
