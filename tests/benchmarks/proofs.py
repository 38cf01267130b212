"""What a run's proofs cost a step: the history of its samples' losses, and the digests of its frozen weights.

    python -m tests.benchmarks.proofs [--precision fp32] [--json OUT] [--quick]

Whole steps with the samples' losses, among what ranks share and in the file, take turns with whole steps without. What
they add is also timed alone, since the turns of a busy machine differ by more. Digests are taken at each checkpoint:
their time is spread over the 200 steps that `train.save_every_steps` has between two by default.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.benchmarks.measure import (
    alternate,
    command,
    median_ratio,
    report,
    seconds_of,
    settled,
    tell,
    wait_for_device,
)
from tests.benchmarks.ours import DTYPES, OurSteps, benchmark_config, our_trainer, sizes
from tests.benchmarks.samples import pack_samples, scienceqa_like
from vltrain.train import guard
from vltrain.train.guard import StepResult
from vltrain.train.trainer import Trainer
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

PACK_LENGTH = 1280
NUM_SAMPLES = 200
BETWEEN_CHECKPOINTS = 200
WANTED = 0.005


def results_of(trainer: Trainer) -> list[StepResult]:
    """The result of the newest step, in the list that is returned."""
    kept: list[StepResult] = []
    step = trainer.step

    def keeping(loaded: Any) -> StepResult:
        kept[:] = [step(loaded)]
        return kept[0]

    trainer.step = keeping
    return kept


def measure(precision: str, runs: int, quick: bool) -> dict[str, Any]:
    dtype = DTYPES[precision]
    with tempfile.TemporaryDirectory() as place:
        changes = {"train__precision": precision, "data__pack_length": PACK_LENGTH, "output": f"{place}/run"}
        config = benchmark_config(quick, data__workers=0 if quick else 1, **changes)
        vocabulary, visual_tokens = sizes(config, quick)
        samples = scienceqa_like(12 if quick else NUM_SAMPLES, vocabulary=vocabulary, visual_tokens=visual_tokens)
        dataset = pack_samples(samples, PACK_LENGTH, Path(place) / "packs", visual_tokens)
        ours = OurSteps(our_trainer(config, dataset, dtype, ds={"zero_optimization": {"stage": 0}}))
        trainer, kept = ours.trainer, results_of(ours.trainer)
        tell(precision)
        steps = alternate({"with": _timed(ours.step), "without": _timed(lambda: _without(ours))}, runs)
        device = trainer.engine.device

        def losses_of_samples() -> None:
            shared = guard._sample_losses(kept[0], device)
            trainer.history.add(shared.float().cpu().numpy())

        alone = alternate({"history": _timed(losses_of_samples), "digests": _timed(trainer.frozen.digests)}, runs)
        num_frozen = sum(one.nbytes for one in trainer.engine.model.parameters() if not one.requires_grad)
        trainer.monitor.close()
        step, history, digests = (statistics.median(one) for one in (steps["without"], *alone.values()))
    return {
        "precision": precision,
        "step, s": step,
        "with history / without": median_ratio(steps["with"], steps["without"]),
        "history alone, s": history,
        "share of a step": history / step,
        "digests, s": digests,
        "of frozen GiB": num_frozen / 2**30,
        f"share of {BETWEEN_CHECKPOINTS} steps": digests / (BETWEEN_CHECKPOINTS * step),
        "wanted, in all": f"<= {WANTED}",
    }


def _without(ours: OurSteps) -> None:
    """A step whose samples' losses stay where they are."""

    def nothing(result: StepResult, device: torch.device) -> torch.Tensor:
        return torch.empty(0, dtype=torch.float64, device=device)

    with patch.object(guard, "_sample_losses", nothing), patch.object(ours.trainer.history, "add", lambda losses: None):
        ours.step()


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        wait_for_device()
        return seconds_of(lambda: (call(), wait_for_device()))

    return run


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    given = settled(parser.parse_args())
    init_distributed()
    rows = [measure(precision, given.runs, given.quick) for precision in given.precision]
    shutdown_distributed()
    report({"proofs": rows}, given)


if __name__ == "__main__":
    main()
