"""Losses of samples' tokens and norms of samples' gradients, before a step and after it, by the trained weights alone.

Each sample runs by itself, without dropout. Its gradient is that of its part of the step's loss, so that the samples'
gradients add up to the step's (before clipping, and but for dropout and AdaLoRA's penalty).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vltrain.batch import Batch, listed
from vltrain.console import Progress
from vltrain.data.plan import FILLER
from vltrain.programs.blame.alone import SampleBatches
from vltrain.programs.blame.ranking import Place
from vltrain.programs.checks.replay import Replay, opened, up_to
from vltrain.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A sample's losses, in nats.

    tokens: of its label tokens, in order; after: the same behind the step's update, None where no step was made.
    gradient_norm: of its part of the step's loss (of its own mean loss, where no step was made).
    """

    tokens: list[float]
    gradient_norm: float
    after: list[float] | None = None

    @property
    def loss(self) -> float:
        """Mean per label token."""
        return mean(self.tokens)

    @property
    def loss_after(self) -> float | None:
        return None if self.after is None else mean(self.after)


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step that was made again. samples: by place; applied: whether the optimizer took it; loss, gradient_norm: the
    step's; first_step: where the replay began."""

    samples: dict[Place, Measured]
    applied: bool
    loss: float
    gradient_norm: float
    first_step: int


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return sum(values) / len(values) if values else math.nan


def measure_step(run: Path, step: int, packs: Path | str) -> MeasuredStep:
    """Makes a step of a run again. Raises InputError as `vltrain.programs.checks.replay.replay`."""
    with opened(run, until=step, packs=packs, zero=False) as found:
        trainer = found.trainer
        loaded = up_to(trainer, step)
        measure = _Meter(found)
        numbers = [pack for pack in loaded.plan.packs.flatten().tolist() if pack != FILLER]
        places = [Place(pack, at) for pack in numbers for at in range(len(found.dataset.sample_ids(pack)))]
        count = loaded.plan.num_label_tokens
        before = {place: measure.with_gradient(place, count) for place in _shown(places, "gradients")}
        result = trainer.step(loaded)
        after = {place: measure.losses(place) for place in _shown(places, "losses after the step")}
        return MeasuredStep(
            samples={
                place: Measured(tokens=tokens, gradient_norm=norm, after=after[place])
                for place, (tokens, norm) in before.items()
            },
            applied=result.applied,
            loss=float(torch.stack(result.losses).sum()) / count,
            gradient_norm=float(result.grad_norm),
            first_step=trainer.first_step,
        )


def measure_now(run: Path, places: Sequence[Place], packs: Path | str) -> tuple[dict[Place, Measured], int]:
    """Samples by the run's newest checkpoint, and the steps behind that. Raises InputError as `measure_step`."""
    with opened(run, until=None, packs=packs, zero=False) as found:
        measure = _Meter(found)
        measured = {}
        for place in _shown(places, "gradients"):
            tokens, norm = measure.with_gradient(place, None)
            measured[place] = Measured(tokens=tokens, gradient_norm=norm)
        return measured, found.trainer.first_step


def _shown(places: Sequence[Place], what: str) -> Iterator[Place]:
    with Progress(total=len(places), title=what, unit="sample") as progress:
        for place in places:
            yield place
            progress.update()


class _Meter:
    """Measures single samples by a trainer's weights as they are now."""

    def __init__(self, replay: Replay) -> None:
        self._trainer: Trainer = replay.trainer
        model = replay.trainer.engine.model
        self._batches = SampleBatches(
            replay.dataset,
            replay.reader,
            model.image_token,
            model.visual_tokens,
            replay.trainer.loader.kept,
        )

    def with_gradient(self, place: Place, label_tokens: int | None) -> tuple[list[float], float]:
        """(losses of the label tokens, norm of the gradient of their sum over `label_tokens`; None: over their own
        number)."""
        engine = self._trainer.engine
        batch = self._batches.of(place)
        if not batch.num_label_tokens:
            return [], 0.0
        with self._alone():
            losses, loss_sum = self._forward(batch)
            weights = list(engine.trainable.values())
            loss = loss_sum / (label_tokens or batch.num_label_tokens)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
        squares = [one.double().square().sum() for one in gradients if one is not None]
        return losses, math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0

    def losses(self, place: Place) -> list[float]:
        """Those of the label tokens."""
        batch = self._batches.of(place)
        if not batch.num_label_tokens:
            return []
        with self._alone(), torch.no_grad():
            return self._forward(batch)[0]

    def _forward(self, batch: Batch) -> tuple[list[float], Tensor]:
        """(losses of the label tokens, their sum)."""
        engine, found = self._trainer.engine, []
        hook = engine.model.llm.lm_head.register_forward_hook(lambda module, given, output: found.append(output[1]))
        try:
            with engine.autocast():
                loss_sum = engine.model(batch.to(engine.device)).loss_sum
        finally:
            hook.remove()
        losses = listed(torch.cat(found).float())
        assert len(losses) == batch.num_label_tokens, "the head computes each label's loss once"
        return losses, loss_sum

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Without dropout."""
        model = self._trainer.engine.model
        model.eval()
        try:
            yield
        finally:
            model.train()
