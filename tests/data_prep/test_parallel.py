"""Work in several processes: the items' order, how far ahead the input is read, what starts them and what their death
does."""

import multiprocessing
import os
import signal
import time
from itertools import count

import pytest

from data_prep import parallel
from data_prep.parallel import in_chunks, ordered_map
from vltrain.errors import InputError


def where(item: int, offset: int) -> tuple[int, int]:
    """The item's result, and the process that made it."""
    time.sleep(0.02 * (item % 3))  # so that they do not end in order
    return item + offset, os.getpid()


def refuse(item: int) -> int:
    if item == 3:
        raise InputError("item 3 is bad")
    return item


def die(item: int) -> int:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return item


def test_work_that_is_soon_done_starts_no_process():
    quick = range(0, 27, 3)  # those on which it does not sleep
    assert list(ordered_map(where, quick, 2, (10,))) == [(10 + item, os.getpid()) for item in quick]


@pytest.mark.parametrize("workers", [2, 3])
def test_results_come_in_the_items_order_whoever_worked_on_them(workers, monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_SECONDS", 0.0)
    results, processes = ordered_map(where, count(), workers, (10,)), []
    for item, (result, process) in enumerate(results):
        assert result == item + 10
        processes.append(process)
        if len(set(processes)) == workers and processes[-1] != processes[0] and item > 40:
            break  # not before the other processes have started
    results.close()
    assert processes[0] == os.getpid(), "the first is worked on here"
    assert processes.count(os.getpid()) > 1, "this process goes on working while the others start"


def test_with_one_worker_all_is_done_here(monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_SECONDS", 0.0)
    assert list(ordered_map(where, range(20), 1, (10,))) == [(10 + item, os.getpid()) for item in range(20)]


def test_the_input_is_read_as_results_are_taken(monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_SECONDS", 0.0)
    read: list[int] = []
    results = ordered_map(where, (read.append(item) or item for item in range(100)), 2, (0,))
    for _ in range(3):
        next(results)
    assert len(read) <= 3 + 2 * parallel.AHEAD
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_where_the_result_would_have(workers, monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_SECONDS", 0.0)
    results = ordered_map(refuse, range(6), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="item 3 is bad"):
        next(results)


def test_a_process_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_SECONDS", 0.0)
    with pytest.raises(InputError, match="one of 2 worker processes was killed"):
        list(ordered_map(die, count(), 2))


def test_chunks_are_consecutive():
    assert list(in_chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and list(in_chunks([], 3)) == []
