"""`vltrain check replay RUN --step K [--packs FOLDER]`: a step of a run once more, in one process, to see each sample's
loss.

The run's newest checkpoint that is not after step K is loaded, the steps from there to K are trained again on the same
global batches, and the losses of step K's samples are shown, largest first. Nothing in the run's folder is changed.
Losses are those of the run to rounding; with dropout they are other draws where the run had several ranks.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.config.schema import Config
from vltrain.console import Progress, logged_from
from vltrain.data.loader import LoadedStep
from vltrain.data.pictures import ImageReader
from vltrain.data.reading import image_reader, recipe_tokenizer, sample_encoder
from vltrain.data.shards import PackedDataset
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.distributed.hardware import choose_dtype, device, limit_threads
from vltrain.distributed.machine import require_machine
from vltrain.errors import InputError
from vltrain.inference.run import recipe_of, weights_before, weights_used
from vltrain.models.build import build_model, outline_model
from vltrain.prepared.ensure_data import packed_folder
from vltrain.prepared.training_data import open_packs
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.determinism import set_determinism
from vltrain.train.guard import own_losses
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.run.made_of import made_of
from vltrain.train.run.origin import find_origin
from vltrain.train.trainer import Trainer
from vltrain.train.zero.ds_config import load_ds_json, resolve_ds_config
from vltrain.train.zero.engine import init_distributed, partitioner, shutdown_distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run, ready to be trained on from a checkpoint in one process, with the packs and the tokenizer that it has."""

    trainer: Trainer
    dataset: PackedDataset
    tokenizer: Tokenizer
    reader: ImageReader


def replay(run: Path, step: int, packs: Path | str | None = None) -> list[tuple[str, float, int]]:
    """(id, mean loss per label token, label tokens) of each sample of a step, not finite ones first, then by size.

    Raises: InputError where the run's folder lacks what is needed, or has no such step.
    """
    with opened(run, until=step, packs=packs) as found:
        return replay_steps(found.trainer, step)


@contextmanager
def opened(run: Path, *, until: int | None, packs: Path | str | None, zero: bool = True) -> Iterator[Replay]:
    """A run at its newest checkpoint of no later step than `until`, at its start where there is none; nothing is
    written into its folder.

    Args:
        packs: where its packs are now; None: where they were.
        zero: under the run's own ZeRO stage; else without ZeRO, so that gradients can be taken of the weights.

    Raises: InputError where the run's folder lacks what is needed.
    """
    config, ds_json = _settings(run, packs, zero=zero)
    limit_threads(1)
    start = _start(run, config, until)
    tokenizer = recipe_tokenizer(config)
    encoder = sample_encoder(config, tokenizer, outline_model(config.model, device(), start.dtype))
    if config.data.train_packs is None:  # those that it was trained on, whatever became of the samples; none are made
        own_packs = str(packed_folder(config, encoder))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_packs=own_packs))
    dataset = open_packs(config, encoder)
    _, world_size = init_distributed()
    try:
        model = build_model(
            config.model,
            dtype=start.dtype,
            activation_checkpointing=config.train.activation_checkpointing,
            runs_on=device(),
            place=partitioner(resolve_ds_config(ds_json, config, world_size)),
        )
        reader = image_reader(config, model)
        # A replay's own receipt and history are thrown away, and so is what they say of themselves.
        with tempfile.TemporaryDirectory() as elsewhere, logged_from(logging.ERROR, "vltrain.receipts"):
            trainer = make_trainer(
                dataclasses.replace(config, output=elsewhere),
                ds_json,
                model=model,
                dataset=dataset,
                start=start,
                evaluate=lambda steps_done: None,
            )
            try:
                yield Replay(trainer=trainer, dataset=dataset, tokenizer=tokenizer, reader=reader)
            finally:
                trainer.close()
    finally:
        shutdown_distributed()


def _settings(run: Path, packs: Path | str | None, *, zero: bool) -> tuple[Config, dict[str, Any]]:
    """The run's recipe and DeepSpeed's JSON, for one process that decodes images itself."""
    config = recipe_of(run, "ds_config.json")
    require_machine(workers=0)
    set_determinism(config.train.deterministic)
    if config.data.mixture and packs is None:
        packs = Path(read_receipt(run / RECEIPT).header.packs)
    changed = {"workers": 0} if packs is None else {"workers": 0, "train_packs": str(packs), "mixture": {}}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changed))
    ds_json = load_ds_json(run / "ds_config.json")
    return config, ds_json if zero else {**ds_json, "zero_optimization": {"stage": 0}}


def _start(run: Path, config: Config, until: int | None) -> RunStart:
    """What the replay begins with, after it was checked that its weights belong together."""
    checkpoint = newest_checkpoint(run / "checkpoints", until=until)
    files = made_of(config)
    weights_used(run, config, checkpoint, files)
    if checkpoint is None:
        weights_before(run, config)
    precision = checkpoint.precision if checkpoint is not None else None
    dtype = choose_dtype(config.train.precision, config.model.bits, precision)
    return RunStart(dtype=dtype, checkpoint=checkpoint, origin=find_origin(config, checkpoint), made_of=files)


def up_to(trainer: Trainer, step: int) -> LoadedStep:
    """Trains the steps before `step` and gives what is loaded for it. Raises InputError for a step that the run doesn't
    have."""
    if not trainer.first_step <= step < trainer.plan.num_steps:
        raise InputError(
            f"--step: found {step}, expected one of the run's {trainer.plan.num_steps} steps, counted from 0"
        )
    logger.info("replaying steps %d to %d", trainer.first_step, step)
    trainer.engine.model.train()
    with Progress(total=step - trainer.first_step, title="replay", unit="step") as progress:
        for loaded in trainer.loader:
            if loaded.step == step:
                return loaded
            trainer.safety.guard.push(trainer.step(loaded))
            progress.update()
    raise AssertionError("the loader ends with the plan")


def replay_steps(trainer: Trainer, step: int) -> list[tuple[str, float, int]]:
    """Trains up to `step` and through it. Its samples' losses, see `replay`."""
    result = trainer.step(up_to(trainer, step))
    counts = [count for counts in result.segment_labels for count in counts.tolist() if count]
    losses = [(name, loss, count) for (name, loss), count in zip(own_losses(result), counts, strict=True)]
    return sorted(losses, key=lambda one: -one[1] if math.isfinite(one[1]) else -math.inf)
