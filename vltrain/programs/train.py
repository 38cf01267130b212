"""`vltrain train` and launch/train_mmt.py: from a command line to a trained run.

settings -> outline of the model -> data (made if missing) -> process group -> model, at a checkpoint or fresh -> loop
-> evaluation"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vltrain.audit.recipe import require_audited
from vltrain.config.command_line import COMMAND_LINE, QUIET, REBUILD, TRAIN_OPTIONS, Settings, refuse_ranks
from vltrain.config.older_runs import as_begun
from vltrain.config.recipe import as_mapping, dump_config
from vltrain.config.schema import Config
from vltrain.config.stages import Run, load_stages, refuse_untuned, stage_folders, write_stages
from vltrain.console import RUN_LOG, last_line, run_log, start_logging
from vltrain.data.shards import PackedDataset
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.distributed.hardware import choose_dtype, device, limit_threads
from vltrain.distributed.machine import local_world_size, require_machine
from vltrain.distributed.preemption import Preemption, time_limit_end
from vltrain.distributed.ranks import adopt_ranks, names_lost_ranks
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.leftovers import remove
from vltrain.files.lock import lock_inside, one_writer
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import Loggers, open_loggers
from vltrain.metrics.table import require_loggers
from vltrain.models.build import build_model, count_parameters, count_trained
from vltrain.models.compiled import compile_blocks, require_compilable
from vltrain.models.interface import VisionLanguageModel
from vltrain.preflight.check import check_before_training
from vltrain.prepared.origins import facts_of
from vltrain.prepared.sets import require_sets
from vltrain.prepared.training_data import ensure_training_data
from vltrain.train.announce import announce, log_trainable_share, summary
from vltrain.train.checkpoints.checkpoint import Checkpoint, require_fit
from vltrain.train.checkpoints.selection import evaluated_as, require_same_figures
from vltrain.train.determinism import set_determinism
from vltrain.train.evaluation import SplitEvaluation, evaluated_sets
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.run.identity import (
    FilesOf,
    agreed_over_nodes,
    require_same_run,
    run_identity,
    tell_unknown_files,
)
from vltrain.train.run.kernels import kernels_as_begun
from vltrain.train.run.length import require_reachable
from vltrain.train.run.made_of import made_of
from vltrain.train.run.origin import Origin, find_origin, require_same_frozen, with_peft_folder
from vltrain.train.run.provenance import make_run_folder, write_provenance
from vltrain.train.run.resume import checkpoint_to_resume
from vltrain.train.run.stage import Stage, is_finished, mark_finished
from vltrain.train.trainer import Trainer
from vltrain.train.zero.ds_config import fill_in, load_ds_json, resolve_ds_config, zero_stage
from vltrain.train.zero.engine import init_distributed, partitioner, shutdown_distributed

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Trains a recipe (vltrain recipes lists those that come with vltrain). The same command resumes a run that was "
    "interrupted."
)
EXAMPLES = (
    "vltrain train --recipe quickstart --ds zero2 --ranks 2",
    "vltrain train --recipe table2#ba_8_2 --ds zero3 --ranks 8 --optim.lr 1e-3 --output runs/mine",
    "vltrain train --recipe quickstart --train.init_from runs/quickstart --train.epochs 1 --output runs/more",
    "deepspeed launch/train_mmt.py --ds ds_configs/zero3.json --recipe launch/recipes/NAME.yaml",
)


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain train", default_recipe: Path | None = None) -> int:
    """Trains what the command line describes. Returns the exit code: 0, or 2 for a mistake in the input.

    A run that a signal or the time limit stops raises Preempted: exit code 85, see `vltrain.distributed.preemption`.
    """
    started = time.time()
    adopt_ranks()
    whole = load_stages(
        argv,
        program=program,
        description=DESCRIPTION,
        options=TRAIN_OPTIONS,
        default_recipe=default_recipe,
        examples=EXAMPLES,
    )
    options, configs = whole.parts[0].options, [part.config for part in whole.parts]
    refuse_ranks(options)
    refuse_untuned(whole)
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank, quiet=options[QUIET] is not None, keeps_log=True)
    require_machine(max(config.data.workers for config in configs))
    limit_threads(local_world_size())
    limits = [config.train.time_limit_minutes for config in configs if config.train.time_limit_minutes is not None]
    preemption = Preemption(time_limit_end(os.environ, min(limits, default=None), started))
    with preemption.listening(), names_lost_ranks():
        try:
            run_stages(whole, preemption) if whole.names else run(whole.parts[0], preemption)
        finally:
            shutdown_distributed()
    return 0


def run_stages(whole: Run, preemption: Preemption) -> None:
    """All stages of a run of this rank, one after another, in one process group. What would end a later one is found
    before the first begins.

    A stage that is done is left as it is, after the checks of a run that goes on; one that was interrupted goes on from
    its newest checkpoint.
    """
    resume = whole.parts[0].options["resume"] or "auto"
    if resume not in ("auto", "never"):
        raise InputError(
            f"{COMMAND_LINE}: --resume: found '{resume}', expected auto or never: it is a run in stages; name "
            "one by --recipe FILE#STAGE"
        )
    for part in whole.parts:
        require_runnable(part)
    with ExitStack() as held:
        if int(os.environ.get("RANK", "0")) == 0:
            make_run_folder(whole.folder)
            held.enter_context(one_writer(lock_inside(whole.folder), whole.folder))
            write_stages(whole)
        for part in whole.parts[1:]:
            ensure_training_data(
                part.config,
                choose_dtype(part.config.train.precision, part.config.model.bits),
                rebuild=part.options[REBUILD] is not None,
            )
        for number, (name, part) in enumerate(zip(whole.names, whole.parts, strict=True), start=1):
            logger.info("stage %d of %d, %s: %s", number, len(whole.names), name, part.config.output)
            run(part, preemption, stage=Stage.LAST if number == len(whole.names) else Stage.EARLIER)
            gc.collect()  # the engine of a stage is a ring of references


def require_runnable(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's JSON, after what shows a mistake before hours of preparation, the model's audit last."""
    config = settings.config
    ds_json = load_ds_json(settings.options["ds"])
    require_sets(config)
    stage = zero_stage(resolve_ds_config(ds_json, config, int(os.environ.get("WORLD_SIZE", "1"))))
    require_compilable(config, stage)
    _require_widenable(config, stage)
    require_loggers(config.train.loggers)
    if int(os.environ.get("RANK", "0")) == 0:
        require_audited(config.model)
    return ds_json


def run(settings: Settings, preemption: Preemption, stage: Stage | None = None) -> None:
    """One run of this rank, from its settings to its last evaluation. `stage`: what it is of a run in stages."""
    settings = dataclasses.replace(settings, config=with_peft_folder(settings.config))
    config = settings.config
    set_determinism(config.train.deterministic)
    ds_json = require_runnable(settings)
    folder, rank = Path(config.output), int(os.environ.get("RANK", "0"))
    with ExitStack() as held:
        if rank == 0:
            if stage_folders(folder):
                raise InputError(
                    f"{folder}: holds a run in stages; choose another --output, or name a stage's own folder"
                )
            make_run_folder(folder)
            held.enter_context(one_writer(lock_inside(folder), folder))
            _remove_unfinished(folder)
        held.enter_context(run_log(folder / RUN_LOG, active=rank == 0))
        _train(settings, ds_json, folder, preemption, stage)


def _remove_unfinished(folder: Path) -> None:
    """What a life of the run that was killed had begun to write; for the run's only writer."""
    for pattern in ("*.partial", "ranks/*.json", "ranks/.*.tmp", "checkpoints/.partial-*", ".writable-*"):
        for leftover in folder.glob(pattern):
            remove(leftover)


def _train(
    settings: Settings, ds_json: dict[str, Any], folder: Path, preemption: Preemption, stage: Stage | None
) -> None:
    checkpoint = checkpoint_to_resume(folder, settings.options["resume"] or "auto")
    config = settings.config
    if checkpoint is not None:
        begun = {**checkpoint.belongs_to, **evaluated_as(checkpoint.run_state)}
        config = as_begun(config, begun, settings.given)
    dtype = choose_dtype(
        config.train.precision, config.model.bits, checkpoint.precision if checkpoint is not None else None
    )
    # Before the process group: the model's mistakes, and those of the data, end the run before ranks wait for each
    # other.
    encoder, outline, dataset = ensure_training_data(config, dtype, rebuild=settings.options[REBUILD] is not None)
    require_reachable(
        config, dataset.index.mixing, int(os.environ.get("WORLD_SIZE", "1")), resumed=checkpoint is not None
    )
    ds_json = fill_in(ds_json, count_trained(outline), outline.llm_block_classes)
    # Once on each node, whose disk may hold other files than rank 0's.
    files = made_of(config) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    origin = find_origin(config, checkpoint)
    if files is not None:
        _require_same_start(config, dataset, checkpoint, origin, files, outline)
    if stage is not None and checkpoint is not None and is_finished(folder, checkpoint):
        logger.info("%s: done already, %d steps", folder, checkpoint.step)
        return
    evaluated = evaluated_sets(config)
    _, world_size = init_distributed()
    files = agreed_over_nodes(files)
    start = RunStart(dtype=dtype, checkpoint=checkpoint, origin=origin, made_of=files)
    evaluation = None
    if evaluated:
        evaluation = SplitEvaluation(encoder=encoder, sets=evaluated, made_of=files)
    trainer = assemble(config, ds_json, world_size, dataset, start, evaluation, preemption, settings.given)
    if trainer.rank == 0:
        _describe(trainer, ds_json, encoder.tokenizer, outline, dataset)
    check_before_training(trainer, encoder)
    trainer.train()
    trainer.monitor.close()
    if trainer.rank == 0:
        if stage is not None:
            mark_finished(folder)
        last_line(summary(trainer)) if stage is not Stage.EARLIER else logger.info("%s", summary(trainer))


def assemble(
    config: Config,
    ds_json: dict[str, Any],
    world_size: int,
    dataset: PackedDataset,
    start: RunStart,
    evaluation: SplitEvaluation | None,
    preemption: Preemption,
    given: Collection[str],
) -> Trainer:
    """Model, loggers and trainer. A collective."""
    model = build_model(
        kernels_as_begun(config.model, start.checkpoint, given, device()),
        dtype=start.dtype,
        activation_checkpointing=config.train.activation_checkpointing,
        runs_on=device(),
        place=partitioner(resolve_ds_config(ds_json, config, world_size)),
    )
    if config.train.compile:
        compile_blocks(model)
    loggers = Loggers()
    if dist.get_rank() == 0:
        run = RunContext(folder=Path(config.output), settings=as_mapping(config), first_step=start.first_step)
        loggers = open_loggers(config.train.loggers, run)
    trainer = make_trainer(
        config,
        ds_json,
        model=model,
        dataset=dataset,
        start=start,
        evaluate=lambda steps_done: evaluation(trainer, steps_done) if evaluation is not None else None,
        loggers=loggers,
        preemption=preemption,
    )
    return trainer


def _describe(
    trainer: Trainer,
    ds_json: dict[str, Any],
    tokenizer: Tokenizer,
    outline: VisionLanguageModel,
    dataset: PackedDataset,
) -> None:
    """Writes what the run is into its folder, and says it."""
    config, parameters = trainer.config, count_parameters(outline)
    full = outline.reference_size()
    write_provenance(
        trainer.folder,
        resolved_config=dump_config(config),
        ds_config=ds_json,
        world_size=trainer.engine.world_size,
        parameters=parameters,
        identity=trainer.belongs_to,
        tokenizer=tokenizer.fingerprint,
        data=facts_of(config, dataset),
        full_qformer=full,
    )
    announce(trainer, parameters, dataset)
    if full is not None:
        log_trainable_share(parameters, full)


def _require_same_start(
    config: Config,
    dataset: PackedDataset,
    checkpoint: Checkpoint | None,
    origin: Origin | None,
    files: FilesOf,
    outline: VisionLanguageModel,
) -> None:
    """Raises InputError where the run cannot go on, or begin, as it is told; here so that it is found before the model
    is loaded."""
    if checkpoint is not None:
        require_same_run(checkpoint, run_identity(config, dataset, files, origin.facts if origin else None))
        require_fit(checkpoint, outline)
        require_same_figures(checkpoint.run_state.get("selection", {}), config, str(checkpoint.path))
        tell_unknown_files(checkpoint.belongs_to, checkpoint.path)
    elif origin is not None and origin.checkpoint is not None:
        require_same_frozen(origin.checkpoint, config, files)
        begins = require_fit(origin.checkpoint, outline)
        logger.info("starts from the trained weights of %s, step %d", origin.checkpoint.path, origin.checkpoint.step)
        if begins:
            new = ", ".join(f"{part} {count:,}" for part, count in begins.items())
            logger.info("initialised as without train.init_from, since that run did not train them: %s parameters", new)


def _require_widenable(config: Config, stage: int) -> None:
    """Raises InputError if evaluations are to widen weights that ranks share."""
    asked = config.eval.precision == "fp32" and config.eval.scorer is not None
    if (
        asked
        and stage == 3
        and config.model.bits != 32
        and choose_dtype(config.train.precision, config.model.bits) != torch.float32
    ):
        raise InputError(
            "eval.precision: found 'fp32', but ZeRO-3 partitions the weights in bf16, which cannot be upcast then; "
            "take a lower stage, model.bits 32, or train while evaluating as "
            "training does (eval.precision train), and evaluate afterwards: vltrain evaluate RUN --eval.precision fp32"
        )
