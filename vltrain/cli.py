"""The console script `vltrain`: one word chooses the program, which reads the rest. Programs are imported only when
chosen."""

from __future__ import annotations

import os
import signal
import sys


def _end_at_once(number: int, frame: object) -> None:
    """Ctrl-C while modules are imported, which takes seconds, may swallow exceptions, and has nothing to lose."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


# Before the other imports; not where another program imports this module.
_IS_PROGRAM = os.path.basename(sys.argv[0]) == "vltrain" or sys.argv[0].endswith(os.path.join("vltrain", "__main__.py"))
if _IS_PROGRAM and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_once)

import atexit
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from vltrain.console import start_logging
from vltrain.errors import EXIT_INTERRUPTED, InputError, exits_cleanly, nearest
from vltrain.files.processes import end_with_launchers

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("vltrain.programs.doctor", "check what this machine and its GPUs can do for training, by trying it"),
    "prepare": ("data_prep.prepare", "raw data set -> samples (JSONL and images)"),
    "pack": ("data_prep.pack", "samples -> tokenised, packed shards"),
    "peek": ("data_prep.peek", "show what is in packed shards, token by token"),
    "plan": ("vltrain.programs.plan", "parameters, memory per GPU and disk of a recipe, before it is run"),
    "audit": ("vltrain.programs.audit", "show that packed training of a model is exact, on a small random copy of it"),
    "train": ("vltrain.programs.train", "train a recipe"),
    "submit": ("vltrain.programs.submit", "check a recipe and its memory plan, and submit it to Slurm"),
    "ablate": ("vltrain.programs.studies.ablate", "train and evaluate every row of a table of recipes"),
    "check": (
        "vltrain.programs.check",
        "verify a run's receipt, weights, data or export; replay one of its steps",
    ),
    "blame": (
        "vltrain.programs.blame.program",
        "show which samples did what to a run: of a step, of a spike, or the worst of all, as one HTML file",
    ),
    "compare": (
        "vltrain.programs.compare.program",
        "what differs between runs: recipes, environments, curves, the step in which losses part",
    ),
    "export": ("vltrain.programs.export", "export a trained model as a folder that other software loads"),
    "importance": (
        "vltrain.programs.importance.program",
        "the rank that AdaLoRA left in each sublayer: table, heat map, summary",
    ),
    "scaling": (
        "vltrain.programs.studies.scaling",
        "accuracy over the trained share, of tables that ablate has made: one table, lines, picture",
    ),
    "ask": ("vltrain.programs.ask", "ask a tuned model a question about images, or hold a conversation with it"),
    "answer": ("vltrain.programs.answer", "answer the questions of a VLMEvalKit data set, as its result file"),
    "serve": (
        "vltrain.programs.serve",
        "answer questions over HTTP as OpenAI's chat completions, and on a local web page",
    ),
    "recipes": (
        "vltrain.programs.help.recipes",
        "list the recipes that come with vltrain, or show one of them",
    ),
    "completion": ("vltrain.programs.help.completion", "print a completion script for bash, zsh or fish"),
    "evaluate": ("vltrain.programs.evaluate", "answer a split with a trained run, or score a file of answers"),
}


def usage() -> str:
    """The text of `vltrain --help`."""
    lines = [f"  {name:12}{summary}" for name, (_, summary) in COMMANDS.items()]
    closing = (
        "vltrain COMMAND --help shows its options. Several ranks on this machine: --ranks N; on several machines: "
        "deepspeed launch/*.py, torchrun or srun"
    )
    return "\n".join(["usage: vltrain COMMAND ...", "", *lines, "", closing])


def main(argv: list[str] | None = None) -> int:
    """Runs the program that the first word names. Returns its exit code; 2 for an unknown one. Without `argv`: ends
    this process with it, see `leave`."""
    if signal.getsignal(signal.SIGINT) == _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if argv is None:
        leave(lambda: _choose(sys.argv[1:]))
    return _choose(argv)


def run_script(module: str, **named: Any) -> NoReturn:
    """What every script of ours does: `start` with the command line's words, then `leave`."""
    leave(lambda: start(module, sys.argv[1:], **named))


def leave(program: Callable[[], int]) -> NoReturn:
    """Runs a program and ends this process with the exit code that it returns, or raises as SystemExit.

    Where torch was imported it ends before the interpreter is torn down: that takes one to two seconds, and in a rank a
    thread of gloo's that releases a tensor meanwhile would abort the process (pytorch#190489; exit code 134 after all
    work was done); DeepSpeed's hooks keep the group, and so these threads, to the very end. What comes before is done:
    other threads end, and `atexit` has its turn.
    """
    try:
        code = program()
    except SystemExit as leaving:
        if not isinstance(leaving.code, int):
            raise
        code = leaving.code
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if code == EXIT_INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process only ends now: a second Ctrl-C would show where
    if "torch" not in sys.modules:
        sys.exit(code)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # closed, or its reader has gone
                stream.flush()
    os._exit(code)


@exits_cleanly
def _choose(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from vltrain.shipped import own_version

        print(f"vltrain {own_version()}")
        return 0
    if words[0] not in COMMANDS:
        raise InputError(f"unknown command '{words[0]}', {nearest(words[0], COMMANDS)}")
    if any(word.startswith("--ranks") for word in words):
        from vltrain.launching.local_ranks import asked_ranks, run_on_ranks

        ranks = asked_ranks(words[0], words[1:])
        if ranks is not None:
            return run_on_ranks(words[0], words[1:], ranks)
    module, _ = COMMANDS[words[0]]
    return start(module, words[1:], **({"commands": COMMANDS} if words[0] == "completion" else {}))


@exits_cleanly
def start(module: str, words: list[str], **named: Any) -> int:
    """Imports a program and runs its `main(words, **named)`. Returns the exit code."""
    end_with_launchers()
    if module == COMMANDS["train"][0]:  # what libraries say while they are imported goes to the run's log, too
        start_logging(int(os.environ.get("RANK", "0")), keeps_log=True)
    with _interrupt_ends_at_once():
        main = importlib.import_module(module).main
    return main(words, **named)


@contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """Ctrl-C inside the block ends the process: for imports, see `_end_at_once`."""
    hears = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    )
    if hears:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        if hears:
            signal.signal(signal.SIGINT, signal.default_int_handler)
