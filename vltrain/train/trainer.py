"""The loop, on one screen, and what it is put together from.

fetch -> forward -> backward (per micro-step) -> step -> log -> save -> evaluate
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from vltrain.config.schema import Config
from vltrain.data.loader import LoadedStep, StepLoader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.distributed.hardware import peak_flops
from vltrain.distributed.preemption import Preemption
from vltrain.distributed.stragglers import WorkTimes, slowness, straggler
from vltrain.distributed.watchdog import Watchdog
from vltrain.errors import InputError
from vltrain.memory.out_of_memory import names_pack
from vltrain.metrics.base import MetricLogger
from vltrain.metrics.loggers import Loggers
from vltrain.metrics.monitor import Monitor
from vltrain.metrics.step_log import cut_lines
from vltrain.models.build import count_trained
from vltrain.models.compiled import uncompiled
from vltrain.models.interface import VisionLanguageModel
from vltrain.receipts.receipt import Header, ReceiptWriter, fingerprint
from vltrain.receipts.verify import RUN_ID
from vltrain.train.adalora import RankAllocator
from vltrain.train.checkpoints.background import BackgroundTask
from vltrain.train.checkpoints.checkpoint import Checkpoint, load_trainable, save_checkpoint
from vltrain.train.checkpoints.selection import Selection, measured_by, name_best
from vltrain.train.determinism import step_seed
from vltrain.train.guard import QUARANTINE, LossGuard, StepReading, StepResult
from vltrain.train.optim import lr_factor, parameter_groups, set_learning_rates
from vltrain.train.run.identity import FilesOf, require_same_run, run_id, run_identity
from vltrain.train.run.origin import Origin
from vltrain.train.zero.ds_config import offloads_optimizer, resolve_ds_config
from vltrain.train.zero.engine import Engine, from_rank_0, whole

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
    selection: Selection
    belongs_to: dict[str, Any]
    evaluate: Callable[[int], float | None]
    """Called with the number of steps done, on every rank, in evaluation mode; rank 0 returns the report's figure."""
    preemption: Preemption = field(default_factory=Preemption)
    first_step: int = 0
    guard_state: dict[str, Any] | None = None
    allocator: RankAllocator | None = None
    background: BackgroundTask = field(default_factory=BackgroundTask)

    def __post_init__(self) -> None:
        self.done = self.saved = self.first_step  # steps, and those of them that a checkpoint holds
        train = self.config.train
        self.guard = LossGuard(
            self._read,
            policy=train.on_bad_loss,
            spike_factor=train.spike_factor,
            folder=self.folder,
            state=self.guard_state,
        )
        self.engine.only_finite = self.guard.skips
        self.work = WorkTimes(device=self.engine.device)
        minutes = train.hang_timeout_minutes
        self.watchdog = Watchdog(
            self.folder,
            rank=self.rank,
            world_size=self.engine.world_size,
            timeout_seconds=60 * minutes if minutes else None,
        )

    def train(self) -> None:
        """Trains to the plan's last step, or until early stopping; leaves a checkpoint of the end, and evaluates it.

        Raises Preempted, after a checkpoint, when a signal or the time limit asks to leave.
        """
        with self.watchdog.watching():
            try:
                with self.preemption.training():
                    for _ in self.steps():
                        pass
            finally:
                self.watchdog.at(self.done, "save")
                self.loader.close()
                self.background.wait()
                self.receipt.close()

    def steps(self) -> Iterator[int]:
        """`train`, a step each time: gives the number of steps done, so that whoever measures can stop between them."""
        guard = self.guard
        self.loader.while_waiting = self._leave_while_waiting
        self.engine.model.train()
        # A checkpoint is from before its step's evaluation, which is owed then.
        if self.first_step and self.evaluates_after(self.first_step):
            self.run_evaluation(self.first_step)
        fetched_from = time.perf_counter()
        for loaded in () if self.selection.exhausted else self.loader:
            waited = time.perf_counter() - fetched_from
            self.monitor.fetched(loaded.plan, waited, _num_positions(loaded.plan))
            self.work.fetched(waited)
            result = self.step(loaded)
            guard.push(result)
            self.background.check()
            self.monitor.stepped(result.step, result.lr)
            if self.allocator is not None and (result.step + 1) % self.config.train.log_every_steps == 0:
                self.monitor.scalars(self.allocator.figures(), result.step)
            self._look_for_stragglers(result.step)
            done = self.done = result.step + 1
            leaves = self.preemption.agreed(self.engine.device)
            evaluates = self.evaluates_after(done)
            # Before an evaluation, too: what that decides is decided again by a run that goes on from here. And it may
            # take as long as many steps: a run that is asked to leave then has nothing to lose.
            if done % self.config.train.save_every_steps == 0 or done == self.plan.num_steps or evaluates or leaves:
                guard.flush()
                self.save(done)
            if leaves:
                self._leave(done)
            if evaluates:
                self.run_evaluation(done)
            self.watchdog.at(done, "fetch")
            yield done
            if self.selection.exhausted:
                break
            fetched_from = time.perf_counter()

    def _leave_while_waiting(self) -> None:
        """A rank alone that waits for data stands at a step boundary, and leaves from there; others have to come to one
        together."""
        if self.engine.world_size == 1 and self.preemption.is_asked:
            self.guard.flush()
            if self.done > self.saved:
                self.save(self.done)
            self._leave(self.done)

    def _leave(self, steps_done: int) -> NoReturn:
        self.background.wait()
        self.monitor.close()
        self.preemption.leave(steps_done)

    def _look_for_stragglers(self, step: int) -> None:
        """On logging steps of several ranks. A collective."""
        if self.engine.world_size == 1 or (step + 1) % self.config.train.log_every_steps:
            return
        times = self.work.gather()
        self.monitor.scalars({"speed/slowest_rank_over_median": slowness(times)}, step)
        found = straggler(times)
        if found is not None and self.rank == 0:
            logger.warning("step %d: %s", step, found)

    def evaluates_after(self, steps_done: int) -> bool:
        """Whether an evaluation follows so many steps: every `train.eval_every_steps` or `eval_every_epochs`, and at
        the end; never without a scorer."""
        if self.config.eval.scorer is None:
            return False
        every = self.config.train.eval_every_steps or self.config.train.eval_every_epochs * self.plan.steps_per_epoch
        return steps_done == self.plan.num_steps or (every > 0 and steps_done // every > (steps_done - 1) // every)

    def _read(self, reading: StepReading) -> None:
        self.monitor.loss(reading.step, reading.loss, reading.grad_norm, reading.lr)
        told = {"samples": reading.samples, "label_tokens": reading.label_tokens, "skipped": reading.skipped}
        self.receipt.add(step=reading.step, loss=reading.loss, **told)

    def step(self, loaded: LoadedStep) -> StepResult:
        """One optimizer step on the batches assigned to this rank."""
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
            self.watchdog.at(number, "forward", position)
            last = position == len(loaded.batches) - 1
            penalised = {"penalise": True} if last and self.allocator is not None else {}
            with names_pack(batch, step=number, rank=self.rank):
                with self.work.forward():
                    output = self.engine.forward(batch.to(self.engine.device), **penalised)
                loss = output.loss_sum / loaded.plan.num_label_tokens
                if penalised:
                    loss = self.allocator.regularised(loss, output.penalty)
                self.watchdog.at(number, "backward", position)
                self.engine.backward(loss, last_micro_step=last)
            losses.append(output.loss_sum.detach())
            segment_losses.append(output.segment_losses)
        seen = [batch for batch in loaded.batches if not batch.is_filler]
        result = StepResult(
            step=number,
            losses=losses,
            segment_losses=segment_losses,
            segment_labels=[batch.segment_labels() for batch in loaded.batches],
            sample_ids=[batch.sample_ids for batch in loaded.batches],
            num_label_tokens=loaded.plan.num_label_tokens,
            own_label_tokens=sum(batch.num_label_tokens for batch in seen),
            samples=fingerprint(batch.sample_ids for batch in seen),
            lr=lr,
        )
        self.watchdog.at(number, "update", len(loaded.batches))
        self._update(result)
        result.applied, result.grad_norm = self.engine.applied, self.engine.grad_norm()
        return result

    def _update(self, result: StepResult) -> None:
        if not self.guard.allows(result):
            self.engine.drop_step()
            return
        importance = self.allocator.measure() if self.allocator is not None else {}
        self.engine.step()
        if self.allocator is not None and self.engine.applied:
            self.allocator.take(importance, result.step + 1)

    @property
    def warmup_steps(self) -> float:
        return self.config.optim.warmup_epochs * self.plan.steps_per_epoch

    def save(self, steps_done: int) -> None:
        """Saves the state after `steps_done` steps, or with `train.async_save` takes a copy that is written meanwhile.
        A collective."""
        self.monitor.pause()
        self.watchdog.at(steps_done, "save")
        self.background.wait()
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
            run_state=self.run_state(),
            extra=self.allocator.state() if self.allocator is not None and is_writer else None,
        )
        with self.preemption.saving():
            if self.config.train.async_save and is_writer:
                copy = [
                    (name, weight.clone(), {key: value.clone() for key, value in states.items()})
                    for name, weight, states in state
                ]
                self.background.start(partial(write, iter(copy)))
            else:
                write(state)
        self.saved = steps_done
        self.monitor.pause()

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors: plain JSON."""
        kept = {
            RUN_ID: self.receipt.run,
            "receipt": self.receipt.head,
            "selection": self.selection.state(),
            "guard": self.guard.state(),
        }
        return {**kept, "precision": self.engine.precision}

    def run_evaluation(self, steps_done: int) -> None:
        """Evaluates in evaluation mode, takes the figure into account, and goes back to training. A collective."""
        self.monitor.pause()
        self.watchdog.at(steps_done, "evaluate")
        self.background.wait()
        self.engine.model.eval()
        with self.preemption.nothing_to_lose(), self.engine.autocast(), uncompiled(self.config):
            figure = from_rank_0(self.evaluate(steps_done))
        self.engine.model.train()
        if figure is not None:
            best = self.selection.take(steps_done, figure)
            if best and self.config.train.keep_best and self.rank == 0:
                name_best(self.folder / "checkpoints", steps_done)
            if self.selection.exhausted:
                selection = self.selection
                told = (steps_done, selection.stale, selection.best_step)
                logger.info(
                    "stopped after %d steps: %d evaluations in a row were not better than that of step %s", *told
                )
        self.monitor.pause()


def _num_positions(plan: Any) -> int:
    """Token positions that all ranks compute on in a step: real tokens and two for each filler."""
    return plan.num_tokens + 2 * int((plan.packs < 0).sum())


def pack_cost(model: VisionLanguageModel) -> PackCost:
    """What a pack costs, in FLOPs, for assigning packs to ranks. Label positions are few and left out."""
    flops = model.flops()
    return PackCost(per_token=flops.per_token, per_pair=flops.per_pair, per_image=flops.per_image)


def make_trainer(
    config: Config,
    ds_json: dict[str, Any],
    *,
    model: VisionLanguageModel,
    dataset: PackedDataset,
    checkpoint: Checkpoint | None,
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    evaluate: Callable[[int], float | None],
    loggers: MetricLogger | None = None,
    preemption: Preemption | None = None,
    made_of: FilesOf | None = None,
    origin: Origin | None = None,
) -> Trainer:
    """Puts a run together: plan, engine, loader, monitor; at the checkpoint's step if one is given.

    Args:
        loggers: get the run's metrics; None: nobody does.
        made_of: digests of the files that weights and tokenizer come from; None: they are not known, and not compared.
        origin: of `train.init_from`: whose weights the run begins with, or began with.

    Raises:
        InputError: DeepSpeed's JSON contradicts the recipe, or the checkpoint belongs to another run or model.
    """
    assert (origin is None) == (config.train.init_from is None), "whoever makes a trainer finds its origin"
    folder = Path(config.output)
    belongs_to = run_identity(config, dataset, made_of, origin.facts if origin else None)
    ds_config = resolve_ds_config(ds_json, config, world_size, count_trained(model))
    first_step = _load_start(model, checkpoint, origin, belongs_to, f"rank {rank}", folder)
    plan = Plan(
        dataset.index,
        seed=config.train.seed,
        epochs=config.train.epochs,
        packs_per_step=config.train.packs_per_step,
        world_size=world_size,
        cost=pack_cost(model),
        max_steps=config.train.max_steps,
        images_always=offloads_optimizer(ds_config),
    )
    image_size, framing, flops = model.image_size, model.framing, model.flops()
    engine = Engine(
        model,
        parameter_groups(model.named_parameters(), config.optim, model.part_of),
        ds_config,
        betas=config.optim.betas,
        eps=config.optim.eps,
        autocast_dtype=dtype,
    )
    if checkpoint is not None:
        # AdamW's own count of steps, for its bias correction, has no skipped ones.
        skipped = checkpoint.run_state.get("guard", {}).get("num_skipped", 0)
        engine.load_optimizer_state(checkpoint.optimizer_states(), checkpoint.step - skipped)
    allocator = make_allocator(config, engine, plan, checkpoint)
    loader = StepLoader(
        dataset,
        plan,
        rank,
        image_size=image_size,
        max_image_pixels=config.data.max_image_pixels,
        workers=config.data.workers,
        start_step=first_step,
        pin_memory=engine.device.type == "cuda",
        framing=framing,
    )
    loggers = loggers or Loggers()
    monitor = Monitor(
        folder,
        loggers,
        active=rank == 0,
        first_step=first_step,
        num_steps=plan.num_steps,
        log_every_steps=config.train.log_every_steps,
        flops=flops,
        peak_flops=peak_flops(dtype) * world_size,
    )
    selection = Selection(patience=config.train.early_stopping_patience, measured_by=measured_by(config))
    run_state = checkpoint.run_state if checkpoint is not None else {}
    if "selection" in run_state:
        selection.load(run_state["selection"])
    if rank == 0 and (folder / QUARANTINE).exists():
        cut_lines(folder / QUARANTINE, first_step)
    receipt = ReceiptWriter(
        folder,
        receipt_header(config, plan, dataset, run_id(belongs_to, checkpoint)),
        active=rank == 0,
        first_step=first_step,
        head=run_state.get("receipt"),
    )
    return Trainer(
        config=config,
        folder=folder,
        rank=rank,
        engine=engine,
        plan=plan,
        loader=loader,
        loggers=loggers,
        monitor=monitor,
        receipt=receipt,
        selection=selection,
        belongs_to=belongs_to,
        evaluate=evaluate,
        first_step=first_step,
        guard_state=run_state.get("guard"),
        allocator=allocator,
        preemption=preemption or Preemption(),
    )


def _load_start(
    model: VisionLanguageModel,
    checkpoint: Checkpoint | None,
    origin: Origin | None,
    belongs_to: dict[str, Any],
    rank: str,
    folder: Path,
) -> int:
    """Gives the model the weights that it starts with now. Returns the steps behind it. A collective."""
    if checkpoint is not None:
        require_same_run(checkpoint, belongs_to)
    first_step, digest = checkpoint.step if checkpoint else 0, origin.facts["digest"] if origin else None
    if from_rank_0((first_step, digest)) != (first_step, digest):
        found = f"{rank} goes on from step {first_step}" + (f" with the weights {digest[:12]}" if digest else "")
        raise InputError(
            f"{found}, rank 0 does not: they see different checkpoints in {folder}; start again, or name one "
            "with --resume"
        )
    start = checkpoint or (origin.checkpoint if origin else None)
    if start is not None:
        load_trainable(model, start, whole)
    return first_step


def make_allocator(config: Config, engine: Engine, plan: Plan, checkpoint: Checkpoint | None) -> RankAllocator | None:
    """AdaLoRA's, where the recipe has it, as it was at the checkpoint. Raises InputError if its schedule is longer than
    the run."""
    if config.model.adalora is None:
        return None
    allocator = RankAllocator(engine, config.model.adalora, plan.num_steps)
    if checkpoint is not None:
        allocator.load(checkpoint.extra())
    return allocator


def receipt_header(config: Config, plan: Plan, dataset: PackedDataset, run: str) -> Header:
    """What a run's receipt begins with. `run`: see `vltrain.train.run.identity.run_id`."""
    train = config.train
    return Header(
        run=run,
        data=dataset.manifest.checksum,
        packs=str(dataset.folder),
        seed=train.seed,
        epochs=train.epochs,
        packs_per_step=train.packs_per_step,
        num_steps=plan.num_steps,
    )
