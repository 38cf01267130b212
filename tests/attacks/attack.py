"""What an attack is: a small hostile or broken input, and the proof that it is refused in one line, or done right, or
told.

A module of this folder holds the attacks on one part. Each is a function with the decorator `attack`; its docstring
says what is wrong with the input, it gets an empty folder of its own, and it returns what `refused`, `refuses`, `told`
or `right` gave it:

    @attack("JSON values that are no text")
    def null_answer(folder: Path) -> Shown:
        '''An answer that is null.'''
        samples = write_jsonl(folder / "s.jsonl", [sample(answer=None)])
        return refused(pack_words(samples, folder / "packs"), "turns[1].text", "null", untouched=folder)

Failures are told apart, since they differ in what they cost a user: `silent` (exit code 0 and nothing right or told),
`traceback`, `wait` (no end within the time), `unclear` (refused, but not in one line that names what the attack
expects) and `half written`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tests.support.processes import ROOT
from vltrain.cli import main as vltrain
from vltrain.errors import EXIT_USER_ERROR, InputError

WAIT_SECONDS = 600  # far beyond what any attack takes; one that lasts longer waits without bound
_LONGEST_LINE = 4000  # a refusal longer than that is a dump


@dataclass(frozen=True)
class Shown:
    """What became of an attack: how it ended, and the line that shows it."""

    outcome: Literal["refused", "told", "right"]
    line: str


class AttackFailed(AssertionError):
    """`how`: silent, traceback, wait, unclear or half written."""

    def __init__(self, how: str, what: str) -> None:
        super().__init__(f"{how}: {what}")
        self.how = how


@dataclass(frozen=True)
class Attack:
    """One entry of the list. `slow`: starts processes of its own, and is left out of the plain test run."""

    name: str
    kind: str
    what: str
    run: Callable[[Path], Shown]
    slow: bool


ATTACKS: dict[str, Attack] = {}


def attack(kind: str, *, slow: bool = False) -> Callable[[Callable[[Path], Shown]], Callable[[Path], Shown]]:
    """Enters a function into the list as an instance of `kind`."""

    def enter(function: Callable[[Path], Shown]) -> Callable[[Path], Shown]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        assert name not in ATTACKS and function.__doc__, name
        ATTACKS[name] = Attack(
            name=name, kind=kind, what=function.__doc__.split("\n\n")[0].strip(), run=function, slow=slow
        )
        return function

    return enter


def refused(
    words: Sequence[Any],
    *needles: str,
    untouched: Path | None = None,
    process: bool = False,
    env: dict[str, str | None] | None = None,
) -> Shown:
    """`vltrain WORDS` must end with exit code 2 and one line of error that holds every needle.

    Args:
        untouched: a folder in which nothing may be new, changed or gone afterwards.
        process: run it as a process of its own; needed by what forks, or changes this one.
        env: variables on top of the environment's; None as a value removes one.
    """
    before = _listing(untouched)
    code, output = run_vltrain(words, process=process, env=env)
    last = _last_line(output)
    if "Traceback (most recent call last)" in output:
        raise AttackFailed("traceback", last)
    if code == 0:
        raise AttackFailed("silent", f"exit code 0; {last}")
    if code != EXIT_USER_ERROR or not last.startswith("error: "):
        raise AttackFailed("unclear", f"exit code {code}; {last}")
    _require_needles(last, needles)
    after = _listing(untouched)
    if before != after:
        raise AttackFailed("half written", f"{sorted(map(str, before ^ after))}")
    return Shown("refused", last.removeprefix("error: "))


def refuses(call: Callable[[], Any], *needles: str) -> Shown:
    """The call must raise an InputError of one line that holds every needle. For what has no command line of its
    own."""
    try:
        with _bounded():
            result = call()
    except InputError as error:
        line = str(error)
        if "\n" in line or len(line) > _LONGEST_LINE:
            raise AttackFailed(
                "unclear", f"{len(line)} characters on {line.count(chr(10)) + 1} lines: {line[:200]}"
            ) from None
        _require_needles(line, needles)
        return Shown("refused", line)
    except AttackFailed:
        raise
    except Exception as error:
        raise AttackFailed("traceback", f"{type(error).__name__}: {error}") from error
    raise AttackFailed("silent", f"taken: {result!r:.200}")


def told(words: Sequence[Any], *needles: str, process: bool = False, env: dict[str, str | None] | None = None) -> Shown:
    """`vltrain WORDS` must end with exit code 0 and a line of its output that holds every needle."""
    code, output = run_vltrain(words, process=process, env=env)
    if "Traceback (most recent call last)" in output:
        raise AttackFailed("traceback", _last_line(output))
    if code != 0:
        raise AttackFailed("unclear", f"exit code {code}; {_last_line(output)}")
    for line in output.splitlines():
        if all(needle in line for needle in needles):
            return Shown("told", line.strip())
    raise AttackFailed("silent", f"no line with {needles}; {_last_line(output)}")


def right(line: str) -> Shown:
    """For an attack that has asserted by itself that the right thing was done; `line` says what that is."""
    return Shown("right", line)


def run_vltrain(
    words: Sequence[Any], *, process: bool = False, env: dict[str, str | None] | None = None
) -> tuple[int, str]:
    """`vltrain WORDS`: its exit code and all it printed, stdout before stderr."""
    texts = [str(word) for word in words]
    return _in_a_process(texts, env or {}) if process else _in_here(texts, env or {})


def _in_a_process(words: list[str], env: dict[str, str | None]) -> tuple[int, str]:
    inherited = {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **env,
    }
    environment = {name: value for name, value in inherited.items() if value is not None}
    command = [sys.executable, "-c", "import sys; from vltrain.cli import main; sys.exit(main())", *words]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise AttackFailed("wait", f"no end within {WAIT_SECONDS} s") from None
    return child.returncode, f"{out}\n{err}"


def _in_here(words: list[str], env: dict[str, str | None]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with (
        _environment(env),
        _logged_to(err),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _bounded(),
    ):
        try:
            code = vltrain(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except AttackFailed:
            raise
        except Exception as error:
            raise AttackFailed("traceback", f"{type(error).__name__}: {error}") from error
    return code, f"{out.getvalue()}\n{err.getvalue()}"


@contextlib.contextmanager
def _logged_to(stream: io.StringIO) -> Iterator[None]:
    """Warnings reach stderr as they do in a process of its own, whoever has set up logging in this one."""
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    for name in [name for name, value in changes.items() if value is None]:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises AttackFailed inside the block if it lasts longer than WAIT_SECONDS."""

    def waited(number: int, frame: FrameType | None) -> None:
        raise AttackFailed("wait", f"no end within {WAIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(WAIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _last_line(output: str) -> str:
    # Only \n ends a line: an error may quote any other character.
    lines = [line for line in output.replace("\r", "\n").split("\n") if line.strip()]
    return lines[-1] if lines else "nothing printed"


def _require_needles(line: str, needles: Sequence[str]) -> None:
    missing = [needle for needle in needles if needle not in line]
    if missing or len(line) > _LONGEST_LINE:
        raise AttackFailed("unclear", f"expected {missing} in: {line[:_LONGEST_LINE]}")


def _listing(folder: Path | None) -> set[tuple[str, int, int]]:
    if folder is None:
        return set()
    found = [
        (path, path.lstat()) for path in folder.rglob("*") if not path.is_dir() and path.name != "run.log"
    ]  # which tells of the refusal
    folders = {(str(path), 0, 0) for path in folder.rglob("*") if path.is_dir()}
    return folders | {(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found}
