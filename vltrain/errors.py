"""The one exception for mistakes a user can mend, and how a program ends on it.

Everything that depends on the user's files, settings or machine raises `InputError`: the message says what was found,
what was expected, where, and what to do. Our own broken promises stay `AssertionError`s and keep their traceback.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

P = ParamSpec("P")
EXIT_USER_ERROR = 2


class InputError(ValueError):
    """A mistake in the user's input. Ends the program with exit code 2 and without a traceback."""


def require(condition: bool, key: str, found: Any, expected: str) -> None:
    """Raises InputError for the setting `key` unless the condition holds."""
    if not condition:
        raise InputError(f"{key}: found {found!r}, expected {expected}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the nearest of `known`, or all of them if none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def exits_cleanly(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wraps a program's `main`: an `InputError` is printed on one line of stderr and becomes exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            rank = os.environ.get("RANK", "0")
            print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
            return EXIT_USER_ERROR

    return wrapped
