"""What all benchmarks share: the command line, the alternation of competitors, medians, the table and the JSON.

Competitors are measured in turn (A B A B ...), so that whatever else the machine does meets all of them alike, and the
figures that count are medians of ratios within a run. What this gives up: nothing can be said about a single run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

RUNS = 5
PACKAGES = ("torch", "transformers", "trl", "datasets", "deepspeed", "liger-kernel", "triton")


def command(documentation: str | None, logs: bool = False) -> argparse.ArgumentParser:
    """A parser with what every benchmark understands. logs: it hands `report` lines of the log of speed."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything there")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each competitor, by turns (default: {RUNS})")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: tiny sizes, two runs, no figure worth keeping"
    )
    if logs:
        parser.add_argument(
            "--log",
            nargs="?",
            type=Path,
            const=Path(__file__).with_name("history.jsonl"),
            metavar="FILE",
            help="also append a line for each thing measured to the log of speed (default: history.jsonl here)",
        )
    return parser


def refuse(text: str) -> NoReturn:
    """Ends the program for what its user has to mend: one line, exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2)


def settled(given: argparse.Namespace) -> argparse.Namespace:
    """The command line with what `--quick` implies."""
    if given.runs < 1:
        refuse(f"--runs: found {given.runs}, expected a positive number")
    given.runs = 2 if given.quick else given.runs
    return given


def alternate(competitors: Mapping[str, Callable[[], Any]], runs: int, warm_up: int = 1) -> dict[str, list[Any]]:
    """Calls every competitor in turn, `runs` times around after `warm_up` rounds that do not count. Returns what each
    gave, run by run."""
    results: dict[str, list[Any]] = {name: [] for name in competitors}
    for number in range(-warm_up, runs):
        for name, run in competitors.items():
            start = time.perf_counter()
            result = run()
            tell(
                f"{'warm-up' if number < 0 else f'run {number + 1}/{runs}'}: {name}, "
                f"{time.perf_counter() - start:.2f} s"
            )
            if number >= 0:
                results[name].append(result)
    return results


def tell(text: str) -> None:
    """A line of progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def trim_heap() -> None:
    """Gives back what glibc keeps of freed memory: competitors whose peaks come one after another would else hold them
    all. The next step has to ask for it again: a turn that counts wants several."""
    gc.collect()  # models and hooks hold each other
    with contextlib.suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def wait_for_device() -> None:
    """Until a GPU has done what it was given."""
    import torch  # see `machine`

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], tuple[int, float]]:
    """What makes a step: (its useful tokens, seconds by that clock)."""

    def run() -> tuple[int, float]:
        wait_for_device()
        start = clock()
        tokens = int(step())
        wait_for_device()
        return tokens, clock() - start

    return run


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over the runs of one competitor's figure over another's of the same round."""
    return statistics.median(round_ratios(numerators, denominators))


def round_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """One competitor's figures over another's, round by round."""
    return [one / other for one, other in zip(numerators, denominators, strict=True)]


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    import torch  # takes seconds, which processes that only prepare data need not spend

    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "packages": installed,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(found: dict[str, Any], given: argparse.Namespace) -> None:
    """Prints every list of rows as a table and everything else as it is; writes the JSON if asked for."""
    found = {**found, "runs": given.runs, "quick": given.quick, "machine": machine()}
    for name, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"\n{name}")
            show(value)
        else:
            print(f"{name}: {value}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of equal keys as a Markdown table."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row.values()) + " |")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
