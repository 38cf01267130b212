"""SmolVLM-256M's and 500M's shapes, trained by us and by TRL's SFTTrainer on this device in bf16: random weights, LoRA,
photographs of mixed sizes. The comparison is that of `tests.benchmarks.stock`.

Every trainer has a process of its own, and gives back what memory it does not use at the end of its turn. Two speeds:
with batches waiting, which is what the device does, and over a long window behind the last batch that waited, which is
what the workers can feed. Peaks are of torch's allocations. Emulated, tiny models make a step of each; without TRL,
ours alone. Wants transformers 5.24 or newer, as stock models do, and for TRL: trl, datasets, dill, multiprocess.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from tests.benchmarks.apart import Apart, alone
from tests.benchmarks.measure import alternate
from tests.benchmarks.stock import EPOCHS, KEPT, OURS, TRL, batch_of, charged, rows_of
from tests.benchmarks.stock_competitors import largest_differences, ours, trl
from tests.benchmarks.stock_setting import Setting, prepare
from tests.gpu.part import Findings, run_items

SIZES = ("smolvlm-256m", "smolvlm-500m")
PACK_LENGTH, SAMPLES, WORKERS = 8192, 320, 4
WARM_UP, RUNS = 1, 5  # turns of each, behind one that shows whether it can
TURN = (3, 4)  # steps of a turn that do not count, and that do
WINDOW = (20, 12)  # likewise; the first are more than the batches that the workers have ready
WINDOWS, WINDOWS_END = 3, 90.0  # windows of each; no second one after so many seconds
LIMITS = {"ours, fp32": 1e-4, "ours, bf16": 2e-2, "TRL, fp32": 1e-4}  # relative, of losses


def find(findings: Findings, item: str) -> None:
    began = time.monotonic()
    setting = _setting(findings, item)
    shutil.rmtree(findings.folder)  # of a run before
    longer = replace(setting, folder=findings.folder / "longer", pack_length=2 * setting.pack_length)
    for one in (setting, longer):
        one.folder.mkdir(exist_ok=True)
        prepare(one, 12 if findings.emulate else SAMPLES, 120 if findings.emulate else None)
    has_trl = find_spec("trl") is not None
    with ThreadPoolExecutor(1) as beside:  # while the competitors start
        losses = beside.submit(alone, largest_differences, setting, None, 16, has_trl)
        competitors = _started(findings, item, setting, longer, has_trl)
        findings.attempt("losses", lambda: _check_losses(findings, item, losses.result()))
    turn, window = (TURN, WINDOW) if not findings.emulate else ((0, 1), (0, 1))
    calls = {name: partial(one.ask, "run", *turn) for name, one in competitors.items()}
    for name, call in list(calls.items()):
        if findings.attempt(name, call) is None:  # out of memory, say
            del calls[name]
            competitors.pop(name).close()
    found = alternate(calls, *((1, 0) if findings.emulate else (RUNS, WARM_UP)))
    facts = {name: one.ask("facts") for name, one in competitors.items()}
    _tell(findings, item, "batches waiting", found, facts)
    calls = {name: partial(one.ask, "run", *window) for name, one in competitors.items()}
    windows = alternate(calls, 1, 0)
    while not findings.emulate and len(windows[OURS]) < WINDOWS and time.monotonic() - began < WINDOWS_END:
        for name, more in alternate(calls, 1, 0).items():
            windows[name] += more
    _tell(findings, item, "as the workers feed it", windows, facts)
    _tell_charged(findings, item, setting, windows, facts)
    for one in competitors.values():
        one.close()


def _setting(findings: Findings, item: str) -> Setting:
    if findings.emulate:
        return Setting(folder=findings.folder, size=None, precision="bf16", pack_length=512, workers=0)
    return Setting(folder=findings.folder, size=item, precision="bf16", pack_length=PACK_LENGTH, workers=WORKERS)


def _started(findings: Findings, item: str, setting: Setting, longer: Setting, has_trl: bool) -> dict[str, Apart]:
    """Those that got ready; the others are told. On a GPU all start at once. `longer`: of packs twice as long, which
    stand beside batches twice as large."""
    batch = batch_of(setting)
    threads = 1 if findings.emulate else None
    made: dict[str, tuple[Any, ...]] = {
        OURS: (ours, setting, "ours", threads, False),
        KEPT: (ours, setting, "kept", threads, True),
        "ours, packs twice as long": (ours, longer, "ours", threads, False),
    }
    theirs: dict[str, tuple[int, dict[str, Any]]] = {TRL: (batch, {})} if has_trl else {}
    if has_trl and item == SIZES[0]:
        theirs["TRL, batches twice as large"] = (2 * batch, {})
        if find_spec("liger_kernel") is not None:
            theirs["TRL, Liger's layers"] = (batch, {"use_liger_kernel": True})
    for number, (name, (size, more)) in enumerate(theirs.items()):
        made[name] = (trl, setting, f"trl{number}", threads, size, more)
    competitors = {name: Apart(*how) for name, how in made.items()}
    for name, one in list(competitors.items()):
        if findings.attempt(name, partial(one.ask, "facts")) is None:
            competitors.pop(name).close()
    return competitors


def _check_losses(findings: Findings, item: str, differences: Mapping[str, float]) -> None:
    for name, difference in differences.items():
        findings.check("losses beside a plain loop's in fp32", difference, LIMITS[name], model=item, of=name)


def _tell(
    findings: Findings,
    item: str,
    how: str,
    found: Mapping[str, list[tuple[int, float]]],
    facts: Mapping[str, Mapping[str, float]],
) -> None:
    for row in rows_of(found, facts, lambda _: 0.0):
        findings.row(f"stock trainers, {how}", model=item, **row, turns=len(found[row["trainer"]]))


def _tell_charged(
    findings: Findings,
    item: str,
    setting: Setting,
    windows: Mapping[str, list[tuple[int, float]]],
    facts: Mapping[str, Mapping[str, float]],
) -> None:
    for row in rows_of(windows, facts, lambda own: charged(own, setting, EPOCHS)):
        if row["trainer"] == KEPT:
            made = {"images": setting.packs.manifest.num_images, "made_seconds": facts[KEPT]["made_seconds"]}
            findings.row(f"kept features, charged with making them over {EPOCHS} epochs", model=item, **row, **made)


if __name__ == "__main__":
    chosen = ("tiny",) if "--emulate" in sys.argv else SIZES
    sys.exit(run_items("stock_trainers", chosen, find, __doc__))
