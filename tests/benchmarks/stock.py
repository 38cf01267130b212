"""Useful tokens a second of a stock vision-language model: our trainer beside TRL's SFTTrainer, on the same network,
processor, pictures and optimizer.

    python -m tests.benchmarks.stock [--precision fp32 bf16] [--edge 512] [--pack-length 1024] [--cpu-seconds]

A random model of SmolVLM-256M's shape, LoRA of rank 8 on its LLM. Questions have ScienceQA's lengths, and half of them
a photograph of one of many sizes, a JPEG. TRL's trainer for vision-language models pads each batch to its longest
sample and collates as it trains; batches are of as many samples as a pack of ours holds on average. Useful tokens are
those of samples: prompt, image and answer, no padding. Ours runs twice: encoding images in every step as TRL does, and
with `train.keep_image_features`; what computing these takes is measured and shared out over the epochs of our recipes
(`--epochs`), a step being charged by its tokens. Each trainer has a process of its own, works while it is its turn, and
its peak of memory is told. Beside them: losses beside a plain loop over single samples by transformers' own forward and
loss. On a GPU: `bash tests/gpu.sh --part stock_trainers`. Wants, in an environment of its own: pip install torch
torchvision -e '.[bench]'.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.apart import Apart, alone
from tests.benchmarks.measure import alternate, command, median_ratio, report, round_ratios, settled, tell
from tests.benchmarks.ours import DTYPES
from tests.benchmarks.stock_competitors import largest_differences, ours, trl
from tests.benchmarks.stock_setting import Setting, prepare

NUM_SAMPLES = 240
COMPARED = 3  # samples at least, with the plain loop
STEPS = 3  # of a turn: how many images one has varies
WANTED = 1.8
EPOCHS = 4  # of our recipes of stock models
OURS, KEPT = "ours, images encoded in every step", "ours, image features kept"
TRL = "TRL, padded to the longest"


def batch_of(setting: Setting) -> int:
    """As many samples as a pack holds on average."""
    packs = setting.packs
    return max(2, round(packs.manifest.num_samples / len(packs)))


def charged(facts: Mapping[str, float], setting: Setting, epochs: int) -> float:
    """Seconds a useful token that making kept features takes, shared out over epochs."""
    return facts["made_seconds"] / epochs / setting.packs.manifest.num_tokens


def rows_of(
    found: Mapping[str, list[tuple[int, float]]],
    facts: Mapping[str, Mapping[str, float]],
    charge: Callable[[Mapping[str, float]], float],
) -> list[dict[str, Any]]:
    """The table. found: (useful tokens, seconds) of each turn, by trainer; charge: seconds a token beside a turn's."""
    speeds = {
        name: [1 / (seconds / tokens + charge(facts[name])) for tokens, seconds in turns]
        for name, turns in found.items()
    }
    return [
        {
            "trainer": name,
            "useful tokens/s": statistics.median(speeds[name]),
            "faster than TRL by": median_ratio(speeds[name], speeds[TRL]) if TRL in speeds else "",
            "least and most": spread(speeds[name], speeds[TRL]) if TRL in speeds else "",
            "peak GiB": facts[name]["peak_gib"],
        }
        for name in speeds
    ]


def spread(ours: list[float], theirs: list[float]) -> str:
    """Of the ratios of the rounds."""
    ratios = round_ratios(ours, theirs)
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def measure(setting: Setting, runs: int, epochs: int, quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The table in one precision, and the largest relative differences of losses."""
    setting.folder.mkdir()
    prepare(setting, 12 if quick else NUM_SAMPLES, 120 if quick else None)
    batch, threads = batch_of(setting), torch.get_num_threads()
    tell(f"{setting.precision}: {len(setting.packs)} packs; TRL's batches are of {batch} samples")
    differences = alone(largest_differences, setting, threads, COMPARED, True)
    tell(f"losses: {differences}")
    made = {
        KEPT: (ours, setting, "kept", threads, True),
        OURS: (ours, setting, "ours", threads, False),
        TRL: (trl, setting, "trl", threads, batch, {}),
    }
    competitors = {}
    for name, how in made.items():  # one after another: none takes another's cores
        competitors[name] = Apart(*how)
        tell(f"{name}: {competitors[name].ask('facts')}")
    found = alternate(
        {name: partial(one.ask, "run", 0, 1 if quick else STEPS) for name, one in competitors.items()}, runs, 1
    )
    facts = {name: one.ask("facts") for name, one in competitors.items()}
    for one in competitors.values():
        one.close()
    rows = rows_of(found, facts, lambda own: charged(own, setting, epochs))
    about = {"precision": setting.precision}
    return [{**about, **row, "wanted": "" if row["trainer"] == TRL else WANTED} for row in rows], differences


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--edge", type=int, default=512, help="pixels of an image's longer edge, in tiles of 512")
    parser.add_argument("--pack-length", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="over which computing kept features is shared out")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of a trainer's process, whatever else the machine does; one thread"
    )
    given = settled(parser.parse_args())
    if given.cpu_seconds and torch.get_num_threads() > 1:
        parser.error("--cpu-seconds: threads that wait for others count, too; set OMP_NUM_THREADS=1")
    if find_spec("trl") is None:
        raise SystemExit("the package trl is not installed: bash launch/setup_env.sh --with bench")
    rows: list[dict[str, Any]] = []
    differences = {}
    with tempfile.TemporaryDirectory() as place:
        setting = Setting(
            folder=Path(place),
            size=None if given.quick else "smolvlm-256m",
            precision="fp32",
            pack_length=given.pack_length,
            workers=0 if given.quick else 1,
            edge=given.edge,
            cpu_seconds=given.cpu_seconds,
        )
        for precision in given.precision:
            own = replace(setting, precision=precision, folder=setting.folder / precision)
            found, differences[precision] = measure(own, given.runs, given.epochs, given.quick)
            rows += found
    report({"speed": rows, "largest relative difference of losses to a plain loop's": differences}, given)


if __name__ == "__main__":
    main()
