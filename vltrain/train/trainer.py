"""The loop, on one screen, and what it is put together from.

fetch -> forward -> backward (per micro-step) -> step -> log -> save -> evaluate
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vltrain.config import Config
from vltrain.data.loader import LoadedStep, StepLoader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.models.build import part_of
from vltrain.models.multimodal import MultimodalModel
from vltrain.train.checkpoint import Checkpoint, load_trainable, require_same_run, save_checkpoint
from vltrain.train.ds_config import offloads_optimizer, resolve_ds_config
from vltrain.train.engine import Engine, whole
from vltrain.train.guard import FiniteGuard, StepResult
from vltrain.train.hardware import peak_flops
from vltrain.train.monitor import Monitor
from vltrain.train.optim import lr_factor, parameter_groups, set_learning_rates


@dataclass(kw_only=True)
class Trainer:
    """A run, ready to go. Made by `make_trainer`."""

    config: Config
    folder: Path
    rank: int
    engine: Engine
    plan: Plan
    loader: StepLoader
    monitor: Monitor
    belongs_to: dict[str, Any]
    evaluate: Callable[[int], None]
    """Called with the number of steps done, on every rank, in evaluation mode."""

    def train(self) -> None:
        """Trains from the loader's first step to the plan's last, and leaves a checkpoint of the end."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[int]:
        """`train`, a step each time: gives the number of steps done, so that whoever measures can stop between them."""
        guard = FiniteGuard(self.monitor.loss)
        self.engine.model.train()
        fetched_from = time.perf_counter()
        for loaded in self.loader:
            self.monitor.fetched(loaded.plan, time.perf_counter() - fetched_from, _num_positions(loaded.plan))
            result = self.step(loaded)
            guard.push(result)
            self.monitor.stepped(result.step, result.lr)
            done = result.step + 1
            if done % self.config.train.save_every_steps == 0 or done == self.plan.num_steps:
                guard.flush()
                self.save(done)
            if self.config.train.eval_every_steps and done % self.config.train.eval_every_steps == 0 and done < self.plan.num_steps:
                self.run_evaluation(done)
            yield done
            fetched_from = time.perf_counter()

    def step(self, loaded: LoadedStep) -> StepResult:
        """One optimizer step on the batches that this rank was dealt."""
        number = loaded.step
        # Dropout of a step depends on the step and the rank alone, so that a resumed run draws what an undisturbed one would.
        torch.manual_seed((self.config.train.seed << 40) + (number << 16) + self.rank)
        progress = lr_factor(number, self.plan.num_steps, self.warmup_steps, self.config.optim.min_lr_ratio)
        lr = set_learning_rates(self.engine.optimizer, progress)
        losses, segment_losses = [], []
        for position, batch in enumerate(loaded.batches):
            output = self.engine.forward(batch.to(self.engine.device))
            loss = output.loss_sum / loaded.plan.num_label_tokens
            self.engine.backward(loss, last_micro_step=position == len(loaded.batches) - 1)
            losses.append(output.loss_sum.detach())
            segment_losses.append(output.segment_losses)
        self.engine.step()
        return StepResult(
            step=number, losses=losses, segment_losses=segment_losses, sample_ids=[batch.sample_ids for batch in loaded.batches],
            num_label_tokens=loaded.plan.num_label_tokens, grad_norm=self.engine.grad_norm(), lr=lr,
        )

    @property
    def warmup_steps(self) -> float:
        return self.config.optim.warmup_epochs * self.plan.steps_per_epoch

    def save(self, steps_done: int) -> None:
        """Saves the state after `steps_done` steps. A collective."""
        self.monitor.pause()
        save_checkpoint(
            self.engine.full_state(), self.folder / "checkpoints", step=steps_done, belongs_to=self.belongs_to,
            keep=self.config.train.keep_checkpoints, is_writer=self.rank == 0,
        )
        self.monitor.pause()

    def run_evaluation(self, steps_done: int) -> None:
        """Evaluates in evaluation mode and goes back to training. A collective."""
        self.monitor.pause()
        self.engine.model.eval()
        with self.engine.autocast():
            self.evaluate(steps_done)
        self.engine.model.train()
        self.monitor.pause()


def _num_positions(plan: Any) -> int:
    """Token positions that all ranks compute on in a step: real tokens and two for each filler."""
    return plan.num_tokens + 2 * int((plan.packs < 0).sum())


def pack_cost(model: MultimodalModel) -> PackCost:
    """What a pack costs, in FLOPs, for the deal of packs to ranks. Label positions are few and left out."""
    flops = model.flops()
    return PackCost(per_token=flops.per_token, per_pair=flops.per_pair, per_image=flops.per_image)


def run_identity(config: Config, dataset: PackedDataset) -> dict[str, Any]:
    """What must be equal for two runs to have the same steps: not ranks, ZeRO stage, workers, logging or evaluation."""
    train = {name: getattr(config.train, name) for name in ("epochs", "max_steps", "packs_per_step", "precision", "seed")}
    model = dataclasses.asdict(config.model)
    model["llm"].pop("attention")
    model["adapter"].pop("impl")
    identity = {"model": model, "optim": dataclasses.asdict(config.optim), "train": train, "data": dataset.manifest.checksum}
    return json.loads(json.dumps(identity))  # as it comes back from a checkpoint: tuples are lists there


def make_trainer(
    config: Config, ds_json: dict[str, Any], *, model: MultimodalModel, dataset: PackedDataset, checkpoint: Checkpoint | None,
    rank: int, world_size: int, dtype: torch.dtype, evaluate: Callable[[int], None],
) -> Trainer:
    """Puts a run together: plan, engine, loader, monitor; at the checkpoint's step if one is given.

    Raises:
        InputError: DeepSpeed's JSON contradicts the recipe, or the checkpoint belongs to another run or model.
    """
    folder = Path(config.output)
    belongs_to = run_identity(config, dataset)
    ds_config = resolve_ds_config(ds_json, config, world_size)
    first_step = 0
    if checkpoint is not None:
        require_same_run(checkpoint, belongs_to)
        load_trainable(model, checkpoint, whole)
        first_step = checkpoint.step
    plan = Plan(
        dataset.index, seed=config.train.seed, epochs=config.train.epochs, packs_per_step=config.train.packs_per_step,
        world_size=world_size, cost=pack_cost(model), max_steps=config.train.max_steps, images_always=offloads_optimizer(ds_config),
    )
    image_size, flops = model.image_size, model.flops()
    engine = Engine(
        model, parameter_groups(model.named_parameters(), config.optim, part_of), ds_config,
        betas=config.optim.betas, eps=config.optim.eps, autocast_dtype=dtype,
    )
    if checkpoint is not None:
        engine.load_optimizer_state(checkpoint.optimizer_states(), checkpoint.step)
    loader = StepLoader(
        dataset, plan, rank, image_size=image_size, max_image_pixels=config.data.max_image_pixels,
        workers=config.data.workers, start_step=first_step, pin_memory=engine.device.type == "cuda",
    )
    monitor = Monitor(
        folder, active=rank == 0, first_step=first_step, num_steps=plan.num_steps, log_every_steps=config.train.log_every_steps,
        flops=flops, peak_flops=peak_flops(dtype) * world_size,
    )
    if plan.num_steps == 0:
        raise InputError(f"nothing to train: {len(dataset)} pack(s), train.epochs = {config.train.epochs}")
    return Trainer(
        config=config, folder=folder, rank=rank, engine=engine, plan=plan, loader=loader, monitor=monitor, belongs_to=belongs_to, evaluate=evaluate
    )
