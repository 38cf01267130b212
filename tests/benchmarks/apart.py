"""Competitors in processes of their own, which work when they are asked to: each has its memory to itself, and they can
take turns.

What this gives up: an object of a competitor's cannot be looked at; what is asked for goes through a pipe.
"""

from __future__ import annotations

import atexit
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from vltrain.distributed.signals import end_with_parent


class Apart:
    """An object that another process makes and holds; it begins at once, and `ask` waits for it.

    Args:
        make: called there with `arguments`; both have to be picklable.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), name=make.__name__)
        self._process.start()
        theirs.close()
        atexit.register(self.close)  # before the interpreter waits for what it started

    def ask(self, method: str, *arguments: Any) -> Any:
        """What that method of the object returns. Raises RuntimeError with what went wrong there."""
        try:
            self._pipe.send((method, arguments))
            good, found = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the process of {self._process.name} ended with {code} before its answer") from None
        if not good:
            raise RuntimeError(f"{found.strip().splitlines()[-1]}\n{found}")
        return found

    def close(self) -> None:
        """Ends the process, after `close` of its object if it has one."""
        self._pipe.close()
        self._process.join()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own, which ends then."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    made, error = None, None
    try:
        made = make(*arguments)
    except BaseException:  # told to the first that asks
        error = traceback.format_exc()
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            break
        try:
            answer = (False, error) if error else (True, getattr(made, method)(*given))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    if hasattr(made, "close"):
        made.close()
