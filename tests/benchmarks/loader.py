"""How fast packs with images come out of the loader, and how long a step waits for them.

    python -m tests.benchmarks.loader [--workers 0 1 2] [--image-size 336] [--json OUT] [--quick]

Packs are as long as ScienceQA's samples make them; their images are drawn by the source `shapes` and decoded to what a
ViT-L/14-336 reads. First the loader alone is drained; then SmolLM2-135M with adapters trains on such packs (the tiny
ViT's image size), and the time between a step's end and its batch's arrival is put beside the whole.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data_prep.sources import SOURCES
from tests.benchmarks.measure import alternate, command, report, settled, tell
from tests.benchmarks.ours import OurSteps, benchmark_config, our_trainer, sizes
from tests.benchmarks.samples import Samples, pack_samples, scienceqa_like
from vltrain.data.loader import LoadedStep, StepLoader
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

PACK_LENGTH = 1280
MAX_IMAGE_PIXELS = 50_000_000
WANTED_WAITING = 0.01


def with_drawings(samples: Samples, image_size: int) -> Samples:
    """The samples, their pictures drawn by `shapes`."""
    number = len(samples.pictures)
    splits = {
        "train_images": number,
        "val_images": 1,
        "test_images": 1,
        "questions_per_image": 1,
        "image_size": image_size,
    }
    drawn = (raw.image_sources[0] for raw in SOURCES["shapes"](None, splits) if raw.split == "train")
    pictures = {name: scene() for name, scene in zip(samples.pictures, drawn, strict=True)}  # type: ignore[operator]
    return Samples(segments=samples.segments, pictures=pictures)


class Drained:
    """The steps of one loader, `packs` at a time; workers stay from call to call."""

    def __init__(self, dataset: PackedDataset, workers: int, image_size: int, packs: int) -> None:
        plan = Plan(dataset.index, seed=0, epochs=1e6, packs_per_step=1, world_size=1, cost=PackCost())
        self._loader = StepLoader(dataset, plan, 0, SquareReader(size=image_size, max_pixels=MAX_IMAGE_PIXELS), workers)
        self._steps: Iterator[LoadedStep] = iter(self._loader)
        self._packs = packs

    def __call__(self) -> tuple[float, float]:
        """(packs a second, images a second)"""
        start, images = time.perf_counter(), 0
        for step in islice(self._steps, self._packs):
            images += sum(len(batch.pixels) for batch in step.batches)
        seconds = time.perf_counter() - start
        return self._packs / seconds, images / seconds

    def close(self) -> None:
        self._steps = iter(())
        self._loader.close()


def speeds(
    samples: Samples, visual_tokens: int, worker_counts: list[int], image_size: int, runs: int, quick: bool
) -> list[dict[str, Any]]:
    """The loader alone, by number of workers."""
    with tempfile.TemporaryDirectory() as place:
        dataset = pack_samples(with_drawings(samples, image_size), PACK_LENGTH, Path(place) / "packs", visual_tokens)
        drains = {workers: Drained(dataset, workers, image_size, 4 if quick else 60) for workers in worker_counts}
        results = alternate({f"{workers} workers": drain for workers, drain in drains.items()}, runs)
        for drain in drains.values():
            drain.close()
    rows = []
    for workers in worker_counts:
        packs, images = (statistics.median(found) for found in zip(*results[f"{workers} workers"], strict=True))
        rows.append(
            {
                "workers": workers,
                "packs/s": packs,
                "packs/s per worker": packs / max(workers, 1),
                "images/s": images,
                "image side": image_size,
            }
        )
    return rows


def waits(step: Callable[[], Any], trainer: Any) -> Callable[[], tuple[float, float]]:
    """Calls `step`; gives (seconds waited for data, seconds of the whole step)."""
    waited: list[float] = []
    fetched = trainer.monitor.fetched

    def catching(plan: Any, seconds: float, positions: int) -> None:
        waited.append(seconds)
        fetched(plan, seconds, positions)

    trainer.monitor.fetched = catching

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        step()
        return waited[-1], time.perf_counter() - start

    return run


def waiting(samples: Samples, visual_tokens: int, runs: int, quick: bool) -> dict[str, Any]:
    """The share of a step that passes until its batch is there, one worker decoding meanwhile."""
    with tempfile.TemporaryDirectory() as place:
        config = benchmark_config(
            quick, train__precision="fp32", data__pack_length=PACK_LENGTH, data__workers=1, output=f"{place}/run"
        )
        dataset = pack_samples(with_drawings(samples, 64), PACK_LENGTH, Path(place) / "packs", visual_tokens)
        ours = OurSteps(our_trainer(config, dataset, torch.float32, ds={"zero_optimization": {"stage": 0}}))
        results = alternate({"step": waits(ours.step, ours.trainer)}, 2 * runs)["step"]
        ours.trainer.monitor.close()
        ours.trainer.loader.close()
    waited, whole = (sum(found) for found in zip(*results, strict=True))
    return {
        "steps": len(results),
        "step, s": whole / len(results),
        "waited, s": waited / len(results),
        "share": waited / whole,
        "wanted": f"<= {WANTED_WAITING}",
    }


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=336)
    given = settled(parser.parse_args())
    config = benchmark_config(given.quick)
    vocabulary, visual_tokens = sizes(config, given.quick)
    samples = scienceqa_like(24 if given.quick else 300, vocabulary=vocabulary, visual_tokens=visual_tokens)
    tell(f"{len(samples.pictures)} images of {given.image_size} x {given.image_size}")
    found = {"loader": speeds(samples, visual_tokens, given.workers, given.image_size, given.runs, given.quick)}
    init_distributed()
    found["waiting"] = [waiting(samples, visual_tokens, given.runs, given.quick)]
    shutdown_distributed()
    report(found, given)


if __name__ == "__main__":
    main()
