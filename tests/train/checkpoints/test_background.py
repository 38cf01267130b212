"""One task at a time in a thread, whose failure is not lost."""

import threading

import pytest

from vltrain.train.checkpoints.background import BackgroundTask


def test_the_caller_goes_on_and_waits_before_the_next():
    task, gate, done = BackgroundTask(), threading.Event(), []
    task.start(lambda: (gate.wait(10), done.append(1)))
    task.check()
    assert done == []
    gate.set()
    task.start(lambda: done.append(2))
    task.wait()
    assert done == [1, 2]


@pytest.mark.parametrize("look", ["wait", "check", "start"])
def test_a_failure_is_raised_where_the_run_next_looks_and_once(look):
    task = BackgroundTask()

    def fail() -> None:
        raise OSError("disk full")

    task.start(fail)
    task._thread.join()
    with pytest.raises(OSError, match="disk full"):
        task.start(lambda: None) if look == "start" else getattr(task, look)()
    task.wait()
