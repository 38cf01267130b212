"""Work in several processes: the items' order, how far ahead the input is read, what starts them and what their death does."""

import os
import signal
import time

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
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_work_that_is_soon_done_starts_no_process():
    assert list(ordered_map(where, range(9), 2, (10,))) == [(10 + item, os.getpid()) for item in range(9)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_items_order(workers, monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_SECONDS", 0.0)
    results = list(ordered_map(where, range(20), workers, (10,)))
    assert [result for result, _ in results] == list(range(10, 30))
    assert results[0][1] == os.getpid(), "the first is worked on here"
    others = {process for _, process in results[1:]}
    assert os.getpid() not in others if workers == 2 else others == {os.getpid()}


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
    with pytest.raises(InputError, match="one of 2 worker processes died"):
        list(ordered_map(die, range(8), 2))


def test_chunks_are_consecutive():
    assert list(in_chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and list(in_chunks([], 3)) == []
