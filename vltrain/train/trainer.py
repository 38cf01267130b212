"""The loop, on one screen, and the step in it. `vltrain.train.make_trainer` puts a run together.

fetch -> forward -> backward (per micro-step) -> step -> log -> save -> evaluate
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from vltrain.config.schema import Config
from vltrain.data.loader import LoadedStep, StepLoader
from vltrain.data.plan import Plan, StepPlan
from vltrain.distributed.broadcast import from_rank_0
from vltrain.distributed.preemption import Preemption
from vltrain.metrics.base import MetricLogger
from vltrain.metrics.categories import CategoryLosses
from vltrain.metrics.monitor import Monitor
from vltrain.metrics.sets import SetFigures
from vltrain.models.compiled import uncompiled
from vltrain.receipts.frozen_proof import FROZEN
from vltrain.receipts.history import HistoryWriter
from vltrain.receipts.receipt import ReceiptWriter, fingerprint
from vltrain.receipts.verify import RUN_ID
from vltrain.train.adalora import RankAllocator
from vltrain.train.balance import MEASURED, MeasuredCost
from vltrain.train.checkpoints.background import BackgroundTask
from vltrain.train.checkpoints.checkpoint import save_checkpoint
from vltrain.train.checkpoints.selection import BestTracker, name_best
from vltrain.train.determinism import step_seed
from vltrain.train.guard import StepReading, StepResult
from vltrain.train.optim import lr_factor, set_learning_rates
from vltrain.train.pictures.norms import WeightNorms, weight_norms
from vltrain.train.pictures.ranks import draw_ranks, ranks_of
from vltrain.train.run.kernels import KEPT, chosen_kernels
from vltrain.train.safety import make_safety
from vltrain.train.zero.engine import Engine
from vltrain.train.zero.frozen import FrozenWeights

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """A run, ready to go. Made by `make_trainer`."""

    config: Config
    folder: Path
    rank: int
    engine: Engine
    plan: Plan
    loader: StepLoader
    loggers: MetricLogger
    monitor: Monitor
    receipt: ReceiptWriter
    history: HistoryWriter
    by_category: CategoryLosses
    sets: SetFigures
    frozen: FrozenWeights
    best: BestTracker
    belongs_to: dict[str, Any]
    evaluate: Callable[[int], float | None]
    """Called with the number of steps done, on every rank, in evaluation mode; rank 0 returns the report's metric."""
    preemption: Preemption
    first_step: int = 0
    guard_state: dict[str, Any] | None = None
    measured_cost: MeasuredCost | None = None
    allocator: RankAllocator | None = None
    background: BackgroundTask = field(default_factory=BackgroundTask)

    def __post_init__(self) -> None:
        self.done = self.saved = self.first_step  # steps, and those of them that a checkpoint holds
        part_of = self.engine.model.part_of
        self.norms = WeightNorms(self.folder, self.loggers, part_of, active=self.rank == 0, first_step=self.first_step)
        self.safety = make_safety(
            self.config.train,
            self.folder,
            world=(self.rank, self.engine.world_size),
            device=self.engine.device,
            report=self._report,
            guard_state=self.guard_state,
            preemption=self.preemption,
        )
        self.engine.only_finite = self.safety.guard.skips

    def train(self) -> None:
        """Trains to the plan's last step, or until early stopping; leaves a checkpoint of the end, and evaluates it.

        Raises Preempted, after a checkpoint, when a signal or the time limit asks to leave.
        """
        with self.safety.watching():
            try:
                with self.safety.training():
                    for _ in self.steps():
                        pass
            finally:
                self.safety.at(self.done, "save")
                self.loader.close()
                self.background.wait()
                self.receipt.close()
                self.history.close()

    def close(self) -> None:
        """Closes what it holds open, where it is not trained."""
        self.loader.close()
        self.monitor.close()
        self.receipt.close()
        self.history.close()

    def steps(self) -> Iterator[int]:
        """`train`, a step each time: gives the number of steps done, so that whoever measures can stop between them."""
        self.loader.while_waiting = self._leave_while_waiting
        self.engine.model.train()
        # A checkpoint is from before its step's evaluation, which is owed then.
        if self.first_step and self.evaluates_after(self.first_step):
            self.run_evaluation(self.first_step)
        self.safety.waits_for_data()
        for loaded in () if self.best.exhausted else self.loader:
            self.monitor.fetched(loaded.plan, self.safety.fetched(), _num_positions(loaded.plan))
            result = self.step(loaded)
            done, saves = result.step + 1, self.saves_after(result.step + 1)
            if saves:
                result.frozen = self.frozen.digests()
            self.safety.guard.push(result)
            self.background.check()
            self._log(result)
            self.done, leaves = done, self.safety.asks_to_leave()
            # Before an evaluation, too: what that decides is decided again by a run that goes on from here. And it may
            # take as long as many steps: a run that is asked to leave then has nothing to lose.
            if saves or leaves:
                self.safety.guard.flush()
                self.save(done, result.frozen)
            if leaves:
                self._leave(done)
            if self.evaluates_after(done):
                self.run_evaluation(done)
            self.safety.at(done, "fetch")
            yield done
            if self.best.exhausted:
                break
            self.safety.waits_for_data()

    def _log(self, result: StepResult) -> None:
        """What is known of a step at once; the loss comes a step later (`_report`)."""
        self.monitor.stepped(result.step, result.lr)
        if (result.step + 1) % self.config.train.log_every_steps == 0:
            self.norms.measure(weight_norms(self.engine), result.step)
            epoch, skipped = (result.step + 1) / self.plan.steps_per_epoch, self.safety.guard.num_skipped
            self.monitor.scalars({"data/epoch": epoch, "checks/skipped_updates": skipped}, result.step)
            if self.allocator is not None:
                self.monitor.scalars(self.allocator.figures(), result.step)
        self.monitor.scalars(self.safety.stragglers(result.step), result.step)

    def _report(self, reading: StepReading) -> None:
        of_sets = self.sets.add(reading.step, reading.sample_losses)
        told = self.sets.log_line(of_sets)
        self.monitor.loss(reading.step, reading.loss, reading.grad_norm, reading.lr, told)
        is_logged = (reading.step + 1) % self.config.train.log_every_steps == 0
        self.monitor.scalars(self.sets.scalars(of_sets, is_logged), reading.step)
        self.history.add(reading.sample_losses)  # first: a receipt's step is in the history, whenever we are killed
        self.monitor.scalars(self.by_category.add(reading.step, reading.sample_losses), reading.step)
        counts = {"samples": reading.samples, "label_tokens": reading.label_tokens, "skipped": reading.skipped}
        sets = {name: one.to_receipt() for name, one in of_sets.items()}
        self.receipt.add(step=reading.step, loss=reading.loss, frozen=reading.frozen, sets=sets or None, **counts)

    def _leave_while_waiting(self) -> None:
        if self.safety.leaves_alone():
            self.safety.guard.flush()
            if self.done > self.saved:
                self.save(self.done)
            self._leave(self.done)

    def _leave(self, steps_done: int) -> NoReturn:
        self.background.wait()
        self.monitor.close()
        self.safety.leave(steps_done)

    def saves_after(self, steps_done: int) -> bool:
        """Whether a checkpoint follows so many steps, with the digests of the frozen weights in the receipt. One before
        leaving has them itself: a receipt does not depend on when its run was interrupted."""
        at_end = steps_done == self.plan.num_steps
        return at_end or steps_done % self.config.train.save_every_steps == 0 or self.evaluates_after(steps_done)

    def evaluates_after(self, steps_done: int) -> bool:
        """Whether an evaluation follows so many steps: every `train.eval_every_steps` or `eval_every_epochs`, and at
        the end; never without a scorer."""
        if self.config.eval.scorer is None:
            return False
        every = self.config.train.eval_every_steps or self.config.train.eval_every_epochs * self.plan.steps_per_epoch
        return steps_done == self.plan.num_steps or (every > 0 and steps_done // every > (steps_done - 1) // every)

    def step(self, loaded: LoadedStep) -> StepResult:
        """One optimizer step on the batches assigned to this rank."""
        result = self.accumulate(loaded)
        self.update(result)
        return result

    def accumulate(self, loaded: LoadedStep) -> StepResult:
        """Forward and backward of a step: its gradients are complete then."""
        number = loaded.step
        # Dropout of a step depends on the step and the rank alone, so that a resumed run draws what an undisturbed one
        # would.
        torch.manual_seed(step_seed(self.config.train.seed, number, self.rank))
        optim, plan = self.config.optim, self.plan
        factor = lr_factor(
            number, plan.num_steps, self.warmup_steps, optim.min_lr_ratio, optim.schedule, plan.steps_per_epoch
        )
        lr = set_learning_rates(self.engine.optimizer, factor)
        losses, segment_losses = [], []
        for position, batch in enumerate(loaded.batches):
            self.safety.at(number, "forward", position)
            last = position == len(loaded.batches) - 1
            penalised = {"penalise": True} if last and self.allocator is not None else {}
            with self.safety.oom_context(batch, number):
                with self.safety.forward():
                    output = self.engine.forward(batch.to(self.engine.device), **penalised)
                loss = output.loss_sum / loaded.plan.num_label_tokens
                if penalised:
                    loss = self.allocator.regularised(loss, output.penalty)
                self.safety.at(number, "backward", position)
                self.engine.backward(loss, last_micro_step=last)
            losses.append(output.loss_sum.detach())
            segment_losses.append(output.segment_losses)
        seen = [batch for batch in loaded.batches if not batch.is_filler]
        return StepResult(
            step=number,
            losses=losses,
            segment_losses=segment_losses,
            segment_labels=[batch.segment_labels() for batch in loaded.batches],
            sample_ids=[batch.sample_ids for batch in loaded.batches],
            places=_places(loaded, self.rank),
            num_samples=loaded.plan.num_samples,
            num_label_tokens=loaded.plan.num_label_tokens,
            own_label_tokens=sum(batch.num_label_tokens for batch in seen),
            samples=fingerprint(batch.sample_ids for batch in seen),
            lr=lr,
        )

    def update(self, result: StepResult) -> None:
        """The optimizer's step, if the guard allows it."""
        self.safety.at(result.step, "update", len(result.losses))
        self._update(result)
        result.applied, result.grad_norm = self.engine.applied, self.engine.grad_norm()

    def _update(self, result: StepResult) -> None:
        if not self.safety.guard.allows(result):
            self.engine.drop_step()
            return
        importance = self.allocator.measure() if self.allocator is not None else {}
        self.engine.step()
        if self.allocator is not None and self.engine.applied:
            self.allocator.update(importance, result.step + 1)

    @property
    def warmup_steps(self) -> float:
        return self.config.optim.warmup_epochs * self.plan.steps_per_epoch

    def save(self, steps_done: int, frozen: dict[str, str] | None = None) -> None:
        """Saves the state after `steps_done` steps, or with `train.async_save` takes a copy that is written meanwhile.
        A collective.

        Args:
            frozen: digests of the frozen weights, where they were taken already.
        """
        self.monitor.pause()
        frozen = self.frozen.digests() if frozen is None else frozen
        self.safety.at(steps_done, "save")
        self.background.wait()
        if told := self.by_category.describe():
            logger.info("%s", told)
        self.history.sync()
        self.receipt.sync()
        is_writer, state = self.rank == 0, self.engine.full_state()
        write = partial(
            save_checkpoint,
            root=self.folder / "checkpoints",
            step=steps_done,
            belongs_to=self.belongs_to,
            is_writer=is_writer,
            keep=self.config.train.keep_checkpoints,
            keep_best=self.config.train.keep_best,
            run_state={**self.run_state(), FROZEN: frozen},
            extra=self.allocator.state() if self.allocator is not None and is_writer else None,
        )
        with self.safety.saving():
            if self.config.train.async_save and is_writer:
                copy = [
                    (name, weight.clone(), {key: value.clone() for key, value in states.items()})
                    for name, weight, states in state
                ]
                self.background.start(partial(write, iter(copy)))
            else:
                write(state)
        self.saved = steps_done
        if self.config.eval.scorer is None:
            self._draw(steps_done)
        self.monitor.pause()

    def _draw(self, steps_done: int) -> None:
        """Pictures of the weights, where training pauses anyway."""
        self.norms.show(steps_done)
        if self.allocator is not None and self.allocator.kept and self.rank == 0:
            self.loggers.figure("adalora/ranks", draw_ranks(ranks_of(self.allocator.kept)), steps_done)

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors: plain JSON."""
        kept = {
            RUN_ID: self.receipt.run,
            "receipt": self.receipt.head,
            "selection": self.best.state(),
            "guard": self.safety.guard.state(),
        }
        if self.measured_cost is not None:
            kept[MEASURED] = asdict(self.measured_cost)
        return {**kept, "precision": self.engine.precision, KEPT: chosen_kernels(self.engine.model)}

    def run_evaluation(self, steps_done: int) -> None:
        """Evaluates in evaluation mode, takes its metric into account, and goes back to training. A collective."""
        self.monitor.pause()
        self.safety.at(steps_done, "evaluate")
        self.background.wait()
        self.engine.model.eval()
        with self.safety.evaluating(), self.engine.autocast(), uncompiled(self.config):
            metric = from_rank_0(self.evaluate(steps_done))
        self.engine.model.train()
        self._draw(steps_done)
        if metric is not None:
            is_best = self.best.update(steps_done, metric)
            if is_best and self.config.train.keep_best and self.rank == 0:
                name_best(self.folder / "checkpoints", steps_done)
            if self.best.exhausted:
                logger.info(
                    "stopped after %d steps: %d evaluations in a row were not better than that of step %s",
                    steps_done,
                    self.best.stale,
                    self.best.best_step,
                )
        self.monitor.pause()


def _places(loaded: LoadedStep, rank: int) -> list[int | None]:
    """See `StepResult.places`."""
    first = loaded.plan.first_samples[:, rank].tolist()
    return [None if batch.is_filler else place for batch, place in zip(loaded.batches, first, strict=True)]


def _num_positions(plan: StepPlan) -> int:
    """Token positions that all ranks compute on in a step: real tokens and two for each filler."""
    return plan.num_tokens + 2 * int((plan.packs < 0).sum())
