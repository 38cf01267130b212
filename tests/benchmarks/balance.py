"""What `train.balance measured` brings: how well seconds of packs are predicted by FLOPs and by a fit of a few measured
ones, and how long a step of several ranks takes when packs are assigned by either.

    python -m tests.benchmarks.balance [--packs 40] [--ranks 2 4 8] [--precision fp32] [--json OUT] [--quick]

SmolLM2-135M with adapters and a random ViT-B/16; packs of ScienceQA's lengths and images. Every pack's forward and
backward is timed by the CPU's seconds of one thread (the fastest of `--runs`), a few of them are fitted as a run does
it, and steps of four packs a rank are put together from what the packs took: ranks that wait for each other in each
micro-step (ZeRO 2 and 3), or at the step's end (ZeRO 0 and 1). So no rank really runs beside another here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.measure import command, report, settled, tell
from tests.benchmarks.ours import DTYPES, benchmark_config, our_trainer, sizes
from tests.benchmarks.samples import pack_samples, scienceqa_like
from vltrain.data.flat.index import Index
from vltrain.data.loader import load_pack
from vltrain.data.plan import FILLER, PackCost, Plan
from vltrain.data.reading import image_reader
from vltrain.train.balance import NUM_PACKS, choose_packs, features_of, fitted, there_and_back
from vltrain.train.make_trainer import pack_cost
from vltrain.train.run.fits import run_flops
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

PACK_LENGTH = 512
PACKS_A_RANK = 4
STEPS = 200
VIT_B = {
    "model__vision__source": None,
    "model__vision__config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "model__vision__tap_every": 3,
}


def pack_seconds(precision: str, count: int, runs: int, quick: bool) -> tuple[Index, PackCost, np.ndarray]:
    """(the packs' index, their cost by FLOPs, seconds float64 [count])."""
    with tempfile.TemporaryDirectory() as place:
        changes = {"train__precision": precision, "data__pack_length": PACK_LENGTH, "data__workers": 0}
        config = benchmark_config(quick, **changes, **({} if quick else VIT_B), output=f"{place}/run")
        vocabulary, visual_tokens = sizes(config, quick)
        samples = scienceqa_like(4 * count, vocabulary=vocabulary, visual_tokens=visual_tokens)
        short = [one for one in samples.segments if len(one.input_ids) <= PACK_LENGTH]
        dataset = pack_samples(
            type(samples)(segments=short, pictures=samples.pictures), PACK_LENGTH, Path(place) / "packs", visual_tokens
        )
        trainer = our_trainer(config, dataset, DTYPES[precision], ds={"zero_optimization": {"stage": 0}})
        flops = pack_cost(run_flops(config, trainer.engine.model), dataset)
        reader = image_reader(config, trainer.engine.model)
        packs = np.arange(min(count, len(dataset)))
        seconds = np.full((runs, len(packs)), np.inf)
        for number in range(-1, runs):
            tell("warm-up" if number < 0 else f"run {number + 1}/{runs}")
            for pack in packs.tolist():
                batch = load_pack(dataset, pack, reader, None).to(trainer.engine.device)
                began = time.process_time()
                there_and_back(trainer.engine, batch, last_micro_step=False)
                if number >= 0:
                    seconds[number, pack] = time.process_time() - began
                for weight in trainer.engine.trainable.values():
                    weight.grad = None
        trainer.monitor.close()
        columns = {name: np.array(getattr(dataset.index, name)[packs]) for name in vars(dataset.index)}
        return Index(**columns), flops, seconds.min(axis=0)


def step_seconds(index: Index, cost: PackCost, seconds: np.ndarray, ranks: int) -> tuple[float, float]:
    """Mean seconds of a step of ranks that wait in each micro-step, and of ones that wait at its end."""
    plan = Plan(index, seed=0, epochs=1e6, packs_per_step=PACKS_A_RANK * ranks, world_size=ranks, cost=cost)
    each, end = [], []
    for number in range(STEPS):
        grid = plan.step(number).packs
        taken = np.where(grid == FILLER, 0.0, seconds[grid])
        each.append(taken.max(axis=1).sum())
        end.append(taken.sum(axis=0).max())
    return statistics.fmean(each), statistics.fmean(end)


def compared(index: Index, flops: PackCost, seconds: np.ndarray, ranks: list[int]) -> list[dict[str, Any]]:
    chosen = choose_packs(features_of(index, flops, np.arange(len(seconds))), NUM_PACKS)
    measured = fitted(index, flops, chosen, seconds[chosen])
    costs = {"FLOPs": flops, "measured": measured.cost(flops)}
    rest = np.setdiff1d(np.arange(len(seconds)), chosen)
    errors = {}
    for name, cost in costs.items():
        found = cost.of(index, rest) + (measured.per_pack if name == "measured" else 0.0)
        scale = statistics.median((seconds[rest] / found).tolist())
        errors[name] = float(np.abs(scale * found / seconds[rest] - 1).mean())
    rows = []
    for world_size in ranks:
        ideal = seconds.mean() * PACKS_A_RANK
        for name, cost in costs.items():
            each, end = step_seconds(index, cost, seconds, world_size)
            rows.append(
                {
                    "ranks": world_size,
                    "assigned by": name,
                    "error of packs not measured": errors[name],
                    "ZeRO 2, 3: over the ideal": each / ideal,
                    "ZeRO 0, 1: over the ideal": end / ideal,
                }
            )
    return rows


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--packs", type=int, default=40)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    given = settled(parser.parse_args())
    init_distributed()
    index, flops, seconds = pack_seconds(given.precision, 16 if given.quick else given.packs, given.runs, given.quick)
    shutdown_distributed()
    spread = {"packs": len(seconds), "fastest, s": float(seconds.min()), "slowest, s": float(seconds.max())}
    report({"packs": [spread], "balance": compared(index, flops, seconds, given.ranks)}, given)


if __name__ == "__main__":
    main()
