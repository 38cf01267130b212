"""Work on many items in several processes: results in the items' order, and only a few items ahead of who takes them.

`multiprocessing.Pool.imap` would read the whole input at once; here the input is read as results are consumed, so
memory does not grow with the data set. Other processes are not forked off this one, which may have threads (tokenizers,
BLAS), but off a server that has loaded what they need and nothing else. That takes a second, so this process works too:
alone at first, which is all that a small input needs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any, TypeVar

from vltrain.distributed.signals import block_signals_in_workers, end_with_parent
from vltrain.errors import InputError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items per process that may wait, done or undone
HANDED = (
    4  # undone items that another process has at a time: what it works on, and what keeps it from waiting for this one
)
TELL_SECONDS = 120.0  # of waiting for one result, which takes seconds, before a line about it
LONGEST_SECONDS = 1800.0
ALONE_SECONDS = 0.05  # of work before other processes are started


def usable_cores() -> int:
    """Cores this process may run on, as a job scheduler or a container limits them."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    work: Callable[..., Result], items: Iterable[Item], workers: int, shared: tuple[Any, ...] = ()
) -> Iterator[Result]:
    """Yields work(item, *shared) for each item, in order.

    Args:
        work: a module-level function.
        workers: processes, this one among them.
        shared: further arguments, sent to each process once.

    Raises:
        InputError: a worker process died. What `work` raises is raised here.
    """
    items, spent = iter(items), 0.0
    context = multiprocessing.get_context("forkserver")
    if workers > 1:
        context.set_forkserver_preload(["data_prep.prepare", "data_prep.pack"])
        with block_signals_in_workers():  # Ctrl-C reaches every process of a command; this one answers
            forkserver.ensure_running()  # once in a program; does not wait for it
    for item in items:
        start = time.perf_counter()
        result = work(item, *shared)
        spent += time.perf_counter() - start
        yield result
        if workers > 1 and spent >= ALONE_SECONDS:
            break
    else:
        return
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers - 1, context, initializer=_begin, initargs=(work, shared))
    waiting: deque[Future[Result]] = deque()
    try:
        started = [pool.submit(os.getpid) for _ in range(workers - 1)]
        for item in items:
            free = sum(one.done() for one in started) * HANDED - sum(not one.done() for one in waiting)
            waiting.append(pool.submit(_call, item) if free > 0 else _done_here(work, item, shared))
            while waiting and (waiting[0].done() or len(waiting) >= workers * AHEAD):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except BrokenProcessPool:
        raise InputError(
            f"one of {workers} worker processes was killed, likely out of memory; use fewer workers"
        ) from None
    except BaseException:
        # The interpreter would wait at its end for what they have begun, and they would write where all is being
        # removed.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one that has not even started ends by itself


def _result(future: Future[Result]) -> Result:
    """What another process has made. Raises InputError where it takes longer than LONGEST_SECONDS: it hangs, and not
    for want of work."""
    began = time.monotonic()
    while True:
        try:
            return future.result(timeout=TELL_SECONDS)
        except TimeoutError:
            if future.done():
                raise  # the work's own
            waited = time.monotonic() - began
            if waited > LONGEST_SECONDS:
                raise InputError(
                    f"a process has not answered for {waited:.0f} s; look at the disk that the data is on, or "
                    "use one worker (--workers 1)"
                ) from None
            logger.warning("waiting for a process that has not answered for %.0f s", waited)


def _done_here(work: Callable[..., Result], item: object, shared: tuple[Any, ...]) -> Future[Result]:
    """Its result, or the error that is raised when its turn comes."""
    future: Future[Result] = Future()
    try:
        future.set_result(work(item, *shared))
    except Exception as error:
        future.set_exception(error)
    return future


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items, `size` at a time: single ones would cost more to send than to work on."""
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


_task: tuple[Callable[..., Any], tuple[Any, ...]] | None = None  # of a worker process, set once by _begin


def _begin(work: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    global _task
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    _task = work, shared


def _call(item: Any) -> Any:
    assert _task is not None
    work, shared = _task
    return work(item, *shared)
