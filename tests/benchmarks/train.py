"""Useful tokens a second of our trainer beside transformers' Trainer and TRL, on the same model, samples, optimizer and
precision.

    python -m tests.benchmarks.train [--precision fp32 bf16] [--data scienceqa easyvqa text] [--log [FILE]] [--quick]

SmolLM2-135M, frozen, with Bottleneck Adapters, the visual neck and the tiny ViT. Useful tokens are those of samples:
prompt, image and answer, no padding. Competitors (tests.benchmarks.competitors), each with the size of batches that
short trials find fastest, with Liger's kernels too on a GPU: Trainer with samples of like lengths in a batch (its
`group_by_length`); Trainer on packed rows as others write it, with dense masks; Trainer with any samples in a batch;
Trainer, padded to 512 as the paper's code does; of text, TRL's packing and its `padding_free`. A run is one whole step;
`mfu` is the operations that the mathematics needs over the speed of a large matrix product, measured between the runs.
Wants: bash launch/setup_env.sh --with bench --smollm2.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import history
from tests.benchmarks.competitors import KINDS, WANTED, Setting, kinds_of, make_competitors
from tests.benchmarks.measure import (
    alternate,
    command,
    machine,
    median_ratio,
    refuse,
    report,
    round_ratios,
    settled,
    tell,
    timed,
)
from tests.benchmarks.ours import DTYPES, TOKENIZER, OurSteps, benchmark_config, our_trainer, sizes
from tests.benchmarks.samples import Samples, easyvqa, pack_samples, scienceqa_like
from vltrain.config.schema import Config
from vltrain.distributed.hardware import measured_gemm_flops
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

NUM_SAMPLES = 400
PACK_LENGTH = 1280
DS = {"zero_optimization": {"stage": 0}}
OURS, COMPILED = "ours", "ours, compiled"


def make_samples(data: str, config: Config, quick: bool) -> Samples:
    vocabulary, visual_tokens = sizes(config, quick)
    if data == "easyvqa" and not quick:
        return easyvqa(4 * NUM_SAMPLES, tokenizer=TOKENIZER, visual_tokens=visual_tokens)
    share = {"image_share": 0.0} if data == "text" else {}
    return scienceqa_like(24 if quick else NUM_SAMPLES, vocabulary=vocabulary, visual_tokens=visual_tokens, **share)


def our_ways(setting: Setting, compiled: bool) -> dict[str, OurSteps]:
    """By name: the recipe, and `compiled` with train.compile."""
    config, folder = setting.config, setting.folder
    dataset = pack_samples(setting.samples, setting.pack_length, folder / "packs", sizes(config, setting.quick)[1])
    found = {OURS: OurSteps(our_trainer(config, dataset, setting.dtype, ds=DS))}
    if compiled:
        other = replace(config, output=str(folder / "compiled"), train=replace(config.train, compile=True))
        found[COMPILED] = OurSteps(our_trainer(other, dataset, setting.dtype, ds=DS))
    return found


def measure(
    data: str, precision: str, given: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[float]]]:
    """The table of one data set in one precision, the strongest competitor first; our utilisation; and useful tokens a
    second run by run."""
    dtype = DTYPES[precision]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = benchmark_config(
            given.quick,
            train__precision=precision,
            data__pack_length=PACK_LENGTH,
            data__workers=0 if given.quick or given.cpu else 1,
            output=str(folder / "run"),
        )
        setting = Setting(
            data=data,
            samples=make_samples(data, config, given.quick),
            config=config,
            dtype=dtype,
            folder=folder,
            pack_length=PACK_LENGTH,
            batches=given.batches,
            quick=given.quick,
        )
        ours, competitors = our_ways(setting, given.compile), make_competitors(setting, given.only)
        kinds = {name: kind for name, (kind, _) in competitors.items()}
        peaks: list[float] = []
        calls: dict[str, Callable[[], Any]] = {"matrix product": lambda: peaks.append(measured_gemm_flops(dtype))}
        clock = time.process_time if given.cpu else time.perf_counter
        calls |= {name: timed(one.step, clock) for name, one in ours.items()}
        calls |= {name: timed(held.step, clock) for name, (_, held) in competitors.items()}
        tell(f"{data}, {precision}: {len(setting.samples.segments)} samples, {', '.join([*ours, *competitors])}")
        warm_up = 3 if given.compile else 1
        results = alternate(calls, given.runs, warm_up)
        speeds = {name: [tokens / seconds for tokens, seconds in results[name]] for name in (*ours, *competitors)}
        utilisation = [
            _utilisation(data, precision, name, one, results[name], warm_up, max(peaks)) for name, one in ours.items()
        ]
        for _, held in competitors.values():
            held.stop()
        for one in ours.values():
            one.trainer.monitor.close()
    strongest = sorted(competitors, key=lambda name: median_ratio(speeds[OURS], speeds[name]))
    rows = [_row(data, precision, name, kinds.get(name, ""), speeds) for name in (*ours, *strongest)]
    return rows, utilisation, speeds


def lines(
    commit: str, data: str, precision: str, speeds: dict[str, list[float]], quick: bool, cpu: bool
) -> list[history.Line]:
    """Of the log: ours, beside each competitor."""
    return [
        history.line(
            commit=commit,
            machine=machine(),
            precision=precision,
            what=f"train, {data}",
            unit=f"useful tokens/{'CPU s' if cpu else 's'}",
            values=speeds[OURS],
            reference=name,
            beside=speeds[name],
            quick=quick,
        )
        for name in speeds
        if name != OURS
    ]


def _utilisation(
    data: str, precision: str, name: str, ours: OurSteps, found: list[tuple[int, float]], warm_up: int, peak: float
) -> dict[str, Any]:
    flops = statistics.median(ours.flops(warm_up + run) / seconds for run, (_, seconds) in enumerate(found))
    return {
        "data": data,
        "precision": precision,
        "trainer": name,
        "mfu": flops / peak,
        "gflops": flops / 1e9,
        "peak_gflops": peak / 1e9,
    }


def _row(data: str, precision: str, name: str, kind: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = round_ratios(speeds[OURS], speeds[name])
    return {
        "data": data,
        "precision": precision,
        "trainer": name,
        "useful tokens/s": statistics.median(speeds[name]),
        "ours is faster by": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "wanted": WANTED.get(kind, {}).get(data, ""),
    }


def main() -> None:
    parser = command(__doc__, logs=True)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument(
        "--data", nargs="+", choices=["scienceqa", "easyvqa", "text"], default=["scienceqa", "easyvqa", "text"]
    )
    parser.add_argument(
        "--compile", action="store_true", help="also ours with train.compile, whose first steps take minutes"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=KINDS,
        help="of the kinds of competitors, these",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="seconds of the processor instead of the clock's, on a machine that others use; with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--batches", nargs="+", type=int, help="sizes of batches to try instead of those of the data")
    given = settled(parser.parse_args())
    if given.batches and min(given.batches) < 1:
        refuse(f"--batches: found {min(given.batches)}, expected positive numbers")
    if given.cpu and (torch.cuda.is_available() or torch.get_num_threads() > 1):
        refuse("--cpu: threads that wait for others count, too; set OMP_NUM_THREADS=1, and use no GPU")
    for data in given.data:
        if given.only and not set(given.only) & set(kinds_of(data)):
            refuse(f"--only: none of these trains on --data {data}, only: {', '.join(kinds_of(data))}")
    if "text" in given.data and find_spec("trl") is None:
        refuse(
            "the package trl is not installed: bash launch/setup_env.sh --with bench; or choose --data "
            "scienceqa easyvqa"
        )
    commit = history.measured_commit(given.log, given.quick) if given.log else ""
    init_distributed()
    log: list[history.Line] = []
    found: dict[str, Any] = {"clock": "processor" if given.cpu else "wall", "speed": [], "utilisation": []}
    for precision in given.precision:
        for data in given.data:
            rows, utilisation, speeds = measure(data, precision, given)
            found["speed"] += rows
            found["utilisation"] += utilisation
            log += lines(commit, data, precision, speeds, given.quick, given.cpu)
    shutdown_distributed()
    if given.log:
        history.append(log, given.log)
    report(found, given)


if __name__ == "__main__":
    main()
