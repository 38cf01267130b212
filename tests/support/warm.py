"""A process that has imported what runs need and forks one for each that is asked for: `python -m tests.support.warm`.

Importing torch, transformers and DeepSpeed takes seven seconds of a core, and the tests start hundreds of processes: a
fork has it done already. What comes of one is a process like any other: a group, an environment and files of its own,
to be signalled and killed, which ends as Python does. What it is not: freshly imported. Tests of imports, of memory and
of launchers start theirs from nothing.

Orders come as lines of JSON on stdin: {"program": MODULE or SCRIPT.py, "arguments": [...], "environment": {...},
"folder": ..., "stdout": FILE, "stderr": FILE or null} is answered by a pid, and {"pid": ...} by its exit code, null
while it runs. It ends with stdin.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("train", "evaluate", "check", "export", "plan")
# What they import at first use beside: in this order bitsandbytes' and torch's compilers are loaded by peft, pandas by
# pyarrow.
PRELOADED = (
    "tests.train.worker",
    *(f"vltrain.programs.{name}" for name in PROGRAMS),
    "peft",
    "pyarrow.compute",
    "torch.utils.tensorboard",
)


def serve() -> dict[str, Any] | None:
    """Returns in each child with its order, and in this process, when stdin ends, with None."""
    for line in sys.stdin:
        order = json.loads(line)
        if "pid" in order:
            answer: int | None = None
            done, status = os.waitpid(order["pid"], os.WNOHANG)
            if done:
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                return order
            while os.getsid(answer) != answer:  # whoever hears of it may signal its group at once
                time.sleep(0.001)
        print(json.dumps(answer), flush=True)
    return None


def become(order: dict[str, Any]) -> None:
    """Makes this child what the order describes, but for running it."""
    with open(os.devnull, "rb") as nothing, open(order["stdout"], "wb") as out, contextlib.ExitStack() as files:
        errors = out if order["stderr"] is None else files.enter_context(open(order["stderr"], "wb"))
        for descriptor, file in enumerate((nothing, out, errors)):
            os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, encoding="utf-8")  # the old one has read ahead
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv = [order["program"], *order["arguments"]]


if __name__ == "__main__":
    import importlib

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's words
        for name in PRELOADED:
            importlib.import_module(name)
    assert threading.active_count() == 1, "what is forked must have no threads"
    gc.collect()
    gc.freeze()  # or each child would look through all that was imported, and copy its pages by that
    atexit.register(gc.unfreeze)  # C++ libraries tell of leaks otherwise
    print(json.dumps("ready"), flush=True)
    told = serve()
    if told is None:
        os._exit(0)  # nothing is left to do, and tidying up after all these modules takes a second
    become(told)
    if told["program"].endswith(".py"):
        sys.path[0] = str(Path(told["program"]).parent.absolute())
        runpy.run_path(told["program"], run_name="__main__")
    else:
        runpy.run_module(told["program"], run_name="__main__", alter_sys=True)
