"""Work on many items in several processes: results in the items' order, and only a few items ahead of who takes them.

`multiprocessing.Pool.imap` would read the whole input at once; here the input is read as results are consumed, so memory does not grow
with the data set. Processes are spawned, not forked: the caller may have threads (tokenizers, BLAS). That takes seconds, so that the first
items are worked on here: what is done by then needs no other process.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vltrain.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items per process that may wait, done or undone
ALONE_SECONDS = 4.0  # of work before other processes are started


def usable_cores() -> int:
    """Cores this process may run on, as a job scheduler or a container limits them."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    work: Callable[..., Result], items: Iterable[Item], workers: int, shared: tuple[Any, ...] = ()
) -> Iterator[Result]:
    """Yields work(item, *shared) for each item, in order.

    Args:
        work: a module-level function.
        workers: processes; with 0 or 1 the work is done in this one, and in any case the first `ALONE_SECONDS` of it.
        shared: further arguments, sent to each process once.

    Raises:
        InputError: a worker process died. What `work` raises is raised here.
    """
    items, spent = iter(items), 0.0
    for item in items:
        start = time.perf_counter()
        result = work(item, *shared)
        spent += time.perf_counter() - start
        yield result
        if workers > 1 and spent >= ALONE_SECONDS:
            break
    else:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work, shared)) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) >= workers * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(f"one of {workers} worker processes died, most likely for want of memory; use fewer workers") from None
        finally:
            for future in waiting:
                future.cancel()


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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    _task = work, shared


def _call(item: Any) -> Any:
    assert _task is not None
    work, shared = _task
    return work(item, *shared)
