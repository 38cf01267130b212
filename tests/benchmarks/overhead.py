"""What a step of the loop costs beyond its arithmetic: our whole step beside bare forward + backward + AdamW on the
very same batch.

    python -m tests.benchmarks.overhead [--precision fp32] [--stages 0 1 2 3] [--json OUT] [--quick]

A whole step is fetch, forward, backward, reduction, clipping, optimizer, checks and logging, under DeepSpeed. The bare
one calls the same model without DeepSpeed and steps a plain torch AdamW. Both take turns in one process, on one rank.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.measure import alternate, command, median_ratio, report, settled, tell
from tests.benchmarks.ours import DTYPES, OurSteps, benchmark_config, our_trainer, sizes
from tests.benchmarks.samples import pack_samples, scienceqa_like
from vltrain.data.loader import LoadedStep
from vltrain.models.build import build_model
from vltrain.train.optim import parameter_groups
from vltrain.train.trainer import Trainer
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

PACK_LENGTH = 1280
NUM_SAMPLES = 200
WANTED = 0.03


class Bare:
    """Forward, backward and optimizer of a plain model on the batches of a step, and nothing else."""

    def __init__(self, trainer: Trainer, dtype: torch.dtype) -> None:
        config = trainer.config
        self._model = build_model(config.model, dtype=dtype).to(trainer.engine.device)
        groups = parameter_groups(self._model.named_parameters(), config.optim, self._model.part_of)
        self._optimizer = torch.optim.AdamW(
            groups, betas=config.optim.betas, eps=config.optim.eps, fused=torch.cuda.is_available()
        )
        self._autocast = trainer.engine.autocast

    def step(self, loaded: LoadedStep) -> None:
        for batch in loaded.batches:
            with self._autocast():
                output = self._model(batch.to(self._model.modality_embedding.weight.device))
            (output.loss_sum / loaded.plan.num_label_tokens).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def catch_loaded(trainer: Trainer) -> list[LoadedStep]:
    """The step last given to the trainer, kept in the list that is returned."""
    caught: list[LoadedStep] = []
    step = trainer.step

    def catching(loaded: LoadedStep) -> Any:
        caught[:] = [loaded]
        return step(loaded)

    trainer.step = catching
    return caught


def measure(stage: int, precision: str, runs: int, quick: bool) -> dict[str, Any]:
    dtype = DTYPES[precision]
    with tempfile.TemporaryDirectory() as place:
        config = benchmark_config(
            quick,
            train__precision=precision,
            data__pack_length=PACK_LENGTH,
            data__workers=0 if quick else 1,
            output=f"{place}/run",
        )
        vocabulary, visual_tokens = sizes(config, quick)
        samples = scienceqa_like(12 if quick else NUM_SAMPLES, vocabulary=vocabulary, visual_tokens=visual_tokens)
        dataset = pack_samples(samples, PACK_LENGTH, Path(place) / "packs", visual_tokens)
        ours = OurSteps(our_trainer(config, dataset, dtype, ds={"zero_optimization": {"stage": stage}}))
        caught, bare = catch_loaded(ours.trainer), Bare(ours.trainer, dtype)
        tell(f"ZeRO {stage}, {precision}")
        results = alternate({"whole step": _timed(ours.step), "bare": _timed(lambda: bare.step(caught[0]))}, runs)
        ours.trainer.monitor.close()
    return {
        "stage": stage,
        "precision": precision,
        "whole step, s": statistics.median(results["whole step"]),
        "bare, s": statistics.median(results["bare"]),
        "overhead": median_ratio(results["whole step"], results["bare"]) - 1,
        "wanted": f"<= {WANTED}",
    }


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    given = settled(parser.parse_args())
    init_distributed()
    stages = given.stages[:1] if given.quick else given.stages
    rows = [measure(stage, precision, given.runs, given.quick) for precision in given.precision for stage in stages]
    shutdown_distributed()
    report({"overhead": rows}, given)


if __name__ == "__main__":
    main()
