"""The one exception for mistakes a user can mend, and how a program ends on it.

Everything that depends on the user's files, settings or machine raises `InputError`: the message says what was found,
what was expected, where, and what to do. Our own broken promises stay `AssertionError`s and keep their traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, ParamSpec

P = ParamSpec("P")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report Ctrl-C
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
OF_THE_MACHINE = {
    errno.EACCES: "give this user permission, or name another place",
    errno.EPERM: "give this user permission, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some of the quota, or name another place",
    errno.EIO: "the disk, or the way to it, fails; see the kernel's log",
    errno.ESTALE: "the file server has lost it; mount it anew",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "the machine has no memory left for it",
}
"""Errors of the operating system that are no mistake of ours wherever they come from, and what to do."""
last_words_also_to: int | None = None
"""The descriptor of a run's log while there is one, for `end_at_once`."""


class InputError(ValueError):
    """A mistake in the user's input. Ends the program with exit code 2 and without a traceback."""

    exit_code = EXIT_USER_ERROR


class RunLost(InputError):
    """Not the input's fault and not ours: a rank, a machine or the network has gone. Exit code 1, as of a process that
    was killed."""

    exit_code = 1


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
    """Wraps a program's `main`: what depends on the user's input, files and machine ends in one line on stderr, the
    last, and an exit code.

    An InputError, a file that cannot be read or written, and memory that is not there: EXIT_USER_ERROR; Ctrl-C:
    EXIT_INTERRUPTED; a reader that has closed our output, as `| head` does: EXIT_BROKEN_PIPE, without a word. Other
    exceptions, ours, keep their traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                code = main(*args, **kwargs) or 0
            except SystemExit:  # --help
                _flush_output()
                raise
            _flush_output()
            return code
        except KeyboardInterrupt:
            return interrupted()
        except (InputError, OSError, MemoryError) as error:
            if isinstance(error, BrokenPipeError) and _silence_closed_output():
                return EXIT_BROKEN_PIPE
            told = _line_about(error)
            close_progress_bars()
            if told is None:
                raise
            line = one_line(told)
            rank = os.environ.get("RANK", "0")
            print(f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}", file=sys.stderr, flush=True)
            return getattr(error, "exit_code", EXIT_USER_ERROR)
        except Exception:
            close_progress_bars()
            raise

    return wrapped


def _flush_output() -> None:
    """While a full disk can still become the exit code."""
    if sys.stdout is not None:
        sys.stdout.flush()


def interrupted() -> int:
    """Tells on rank 0 that the user has ended the program. Returns the exit code for it."""
    close_progress_bars()
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        print("interrupted", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED


def end_at_once(message: str, code: int) -> NoReturn:
    """For a thread: ends the process with a last line, whatever the main thread hangs in. Nothing is flushed or cleaned
    up."""
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error (rank {rank})"
    line_end = "\n" if _progress_bars() else ""
    line = f"{who}: {one_line(message)}\n"
    with contextlib.suppress(OSError):
        os.write(
            2, (line_end + line).encode(errors="replace")
        )  # not through objects that the main thread may have locked
    if last_words_also_to is not None:
        with contextlib.suppress(OSError):
            os.write(last_words_also_to, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}".encode(errors="replace"))
    os._exit(code)


def one_line(text: str) -> str:
    """A text on one line, with what a terminal obeys or hides written out: a message quotes names and contents of files
    that are not ours."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else " " if one in "\r\n" else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )


def _line_about(error: Exception) -> str | None:
    """One line for an error that is not ours; None for one that may be."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError):
        return (
            f"out of memory ({' '.join(str(error).split()) or 'of the host'}); use fewer workers, smaller batches "
            "or images, or a larger machine"
        )
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{os.strerror(error.errno)}; {OF_THE_MACHINE[error.errno]}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def _silence_closed_output() -> bool:
    """Whether our output's reader has gone; then nothing more is written there, at the interpreter's end neither."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                gone = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        except (AttributeError, OSError, ValueError):  # none, or not a file
            continue
    return gone


def close_progress_bars() -> None:
    """Ends the line of every bar that tqdm shows, so that what is printed next stands on a line of its own."""
    bars = _progress_bars()
    for bar in bars:
        bar.leave = True  # else it is wiped by blanks, which in a file stand before what comes next
    for bar in sorted(bars, key=lambda bar: getattr(bar, "pos", 0)):
        with contextlib.suppress(OSError, ValueError):  # what it is shown on has gone
            bar.close()


def _progress_bars() -> list[Any]:
    module = sys.modules.get("tqdm.std")
    return [] if module is None else list(getattr(module.tqdm, "_instances", ()))
