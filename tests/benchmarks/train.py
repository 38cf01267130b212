"""Useful tokens a second of our trainer beside transformers' Trainer and TRL, on the same model, samples, optimizer and
precision.

    python -m tests.benchmarks.train [--precision fp32 bf16] [--data scienceqa easyvqa text] [--log [FILE]] [--quick]

SmolLM2-135M, frozen, with Bottleneck Adapters, the visual neck and the tiny ViT. Useful tokens are those of samples:
prompt, image and answer, no padding. Competitors: Trainer with samples of like lengths in a batch (its
`group_by_length`), padded to the batch's longest; Trainer with any samples in a batch; Trainer, padded to 512 as the
paper's code does; TRL's packing, which takes text only. A run is one whole step; `mfu` is the operations that the
mathematics needs over the speed of a large matrix product, measured between the runs. Wants: bash launch/setup_env.sh
--with bench --smollm2.
"""

from __future__ import annotations

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
from tests.benchmarks.measure import alternate, command, machine, median_ratio, refuse, report, settled, tell
from tests.benchmarks.ours import DTYPES, TOKENIZER, OurSteps, benchmark_config, our_trainer, sizes
from tests.benchmarks.peers import Held, padding_trainer, trl_trainer
from tests.benchmarks.samples import Samples, easyvqa, pack_samples, scienceqa_like
from vltrain.config.schema import Config
from vltrain.distributed.hardware import measured_gemm_flops
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

NUM_SAMPLES = 400
PADDED_LENGTH = 512
DS = {"zero_optimization": {"stage": 0}}
GROUPED = "grouped by length"
# Samples of a batch. Padded to the longest: what makes some 2,000 useful tokens; to 512: what the paper's code has on a
# GPU, and a machine of this kind can hold.
LONGEST_BATCH = {"scienceqa": 8, "easyvqa": 64}
PADDED_BATCH = 4
WANTED = {"padded to the longest": 1.5, "padded to 512": {"scienceqa": 1.7, "easyvqa": 10.0}, "TRL packing": 1.1}


def make_samples(data: str, config: Config, quick: bool) -> Samples:
    vocabulary, visual_tokens = sizes(config, quick)
    if data == "easyvqa" and not quick:
        return easyvqa(4 * NUM_SAMPLES, tokenizer=TOKENIZER, visual_tokens=visual_tokens)
    share = {"image_share": 0.0} if data == "text" else {}
    return scienceqa_like(24 if quick else NUM_SAMPLES, vocabulary=vocabulary, visual_tokens=visual_tokens, **share)


def make_competitors(
    data: str,
    samples: Samples,
    config: Config,
    dtype: torch.dtype,
    folder: Path,
    pack_length: int,
    quick: bool,
    compiled: bool,
    only: list[str] | None,
) -> dict[str, Any]:
    """By name, what has a `step`; ours first."""
    dataset = pack_samples(samples, pack_length, folder / "packs", sizes(config, quick)[1])
    competitors: dict[str, Any] = {"ours": OurSteps(our_trainer(config, dataset, dtype, ds=DS))}
    if compiled:
        other = replace(config, output=str(folder / "compiled"), train=replace(config.train, compile=True))
        competitors["ours, compiled"] = OurSteps(our_trainer(other, dataset, dtype, ds=DS))
    if data == "text":
        competitors["TRL packing"] = trl_trainer(config, samples, dtype, pack_length=pack_length, folder=folder)
        return competitors
    longest = 2 if quick else LONGEST_BATCH[data]
    whole, padded = (
        {"batch_size": longest, "length": None},
        {"batch_size": 1 if quick else PADDED_BATCH, "length": PADDED_LENGTH},
    )
    for name, how in (
        (GROUPED, {**whole, "grouped": True}),
        ("padded to the longest", whole),
        ("padded to 512", padded),
    ):
        if only is None or name in only:
            competitors[name] = padding_trainer(config, samples, dtype, folder=folder, **how)
    return competitors


def measure(
    data: str, precision: str, runs: int, quick: bool, compiled: bool = False, only: list[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[float]]]:
    """The table of one data set in one precision, our utilisation, and useful tokens a second run by run."""
    dtype = DTYPES[precision]
    pack_length = 1280
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = benchmark_config(
            quick,
            train__precision=precision,
            data__pack_length=pack_length,
            data__workers=0 if quick else 1,
            output=str(folder / "run"),
        )
        samples = make_samples(data, config, quick)
        competitors = make_competitors(data, samples, config, dtype, folder, pack_length, quick, compiled, only)
        peaks: list[float] = []
        calls: dict[str, Callable[[], Any]] = {"matrix product": lambda: peaks.append(measured_gemm_flops(dtype))}
        calls |= {name: timed(competitor.step) for name, competitor in competitors.items()}
        tell(f"{data}, {precision}: {len(samples.segments)} samples, {', '.join(competitors)}")
        warm_up = 3 if compiled else 1
        results = alternate(calls, runs, warm_up)
        speeds = {name: [tokens / seconds for tokens, seconds in results[name]] for name in competitors}
        utilisation = [
            _utilisation(data, precision, name, competitor, results[name], warm_up, max(peaks))
            for name, competitor in competitors.items() if isinstance(competitor, OurSteps)
        ]  # fmt: skip
        for competitor in competitors.values():
            if isinstance(competitor, Held):
                competitor.stop()
            elif isinstance(competitor, OurSteps):
                competitor.trainer.monitor.close()
    rows = [_row(data, precision, name, speeds) for name in competitors]
    return rows, utilisation, speeds


def lines(commit: str, data: str, precision: str, speeds: dict[str, list[float]], quick: bool) -> list[history.Line]:
    """Of the log: ours, beside each competitor."""
    return [
        history.line(
            commit=commit,
            machine=machine(),
            precision=precision,
            what=f"train, {data}",
            unit="useful tokens/s",
            values=speeds["ours"],
            reference=name,
            beside=speeds[name],
            quick=quick,
        )
        for name in speeds
        if name != "ours"
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


def timed(step: Callable[[], Any]) -> Callable[[], tuple[int, float]]:
    def run() -> tuple[int, float]:
        start = time.perf_counter()
        tokens = int(step())  # of a GPU, waits for it
        return tokens, time.perf_counter() - start

    return run


def _row(data: str, precision: str, name: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    wanted = WANTED.get(name, "")
    return {
        "data": data,
        "precision": precision,
        "trainer": name,
        "useful tokens/s": statistics.median(speeds[name]),
        "ours is faster by": median_ratio(speeds["ours"], speeds[name]),
        "wanted": wanted.get(data, "") if isinstance(wanted, dict) else wanted,
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
        choices=[GROUPED, "padded to the longest", "padded to 512"],
        help="of Trainer's ways, these",
    )
    given = settled(parser.parse_args())
    if "text" in given.data and find_spec("trl") is None:
        refuse(
            "the package trl is not installed: bash launch/setup_env.sh --with bench; or choose --data "
            "scienceqa easyvqa"
        )
    commit = history.measured_commit(given.log, given.quick) if given.log else ""
    init_distributed()
    log: list[history.Line] = []
    found: dict[str, Any] = {"speed": [], "utilisation": []}
    for precision in given.precision:
        for data in given.data:
            rows, utilisation, speeds = measure(data, precision, given.runs, given.quick, given.compile, given.only)
            found["speed"] += rows
            found["utilisation"] += utilisation
            log += lines(commit, data, precision, speeds, given.quick)
    shutdown_distributed()
    if given.log:
        history.append(log, given.log)
    report(found, given)


if __name__ == "__main__":
    main()
