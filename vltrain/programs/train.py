"""`vltrain train` and launch/train_mmt.py: from a command line to a trained run.

settings -> outline of the model -> data (made if missing) -> process group -> model, at a checkpoint or fresh -> loop
-> evaluation"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vltrain.config.command_line import COMMAND_LINE, QUIET, REBUILD, TRAIN_OPTIONS, Settings, refuse_ranks
from vltrain.config.older_runs import as_begun
from vltrain.config.recipe import as_mapping, dump_config
from vltrain.config.schema import Config
from vltrain.config.stages import Run, load_stages, stage_folders, write_stages
from vltrain.console import RUN_LOG, last_line, run_log, start_logging
from vltrain.data.images import require_size
from vltrain.data.origin import read_made_from, tokenizer_changes
from vltrain.data.shards import PackedDataset, require_match
from vltrain.data.text.conversation import fingerprint
from vltrain.data.text.spelling import describe_lost
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.distributed.hardware import choose_dtype, device, limit_threads
from vltrain.distributed.machine import local_world_size, require_machine
from vltrain.distributed.preemption import Preemption, time_limit_end
from vltrain.distributed.ranks import adopt_ranks, names_lost_ranks
from vltrain.errors import InputError, exits_cleanly
from vltrain.evaluate.questions import ask
from vltrain.evaluate.ready import answerable_samples, require_scorer
from vltrain.evaluate.run import evaluate_split
from vltrain.files.digest import file_digest
from vltrain.files.leftovers import remove
from vltrain.files.lock import lock_inside, one_writer
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import Loggers, open_loggers
from vltrain.metrics.table import require_loggers
from vltrain.models.build import build_model, count_parameters, count_trained, outline_model
from vltrain.models.compiled import compile_blocks, require_compilable
from vltrain.models.interface import VisionLanguageModel
from vltrain.prepared.ensure_data import packed_folder, ready_packs, ready_samples, require_source
from vltrain.prepared.origins import facts_of, require_same_set, samples_file
from vltrain.receipts.manifest import checkpoints_in
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.receipts.verify import unsaved_steps
from vltrain.train.checkpoints.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint, require_fit
from vltrain.train.checkpoints.selection import require_same_figures
from vltrain.train.determinism import set_determinism
from vltrain.train.run.fits import require_positions, require_qformer_positions, require_tokenizer_fits
from vltrain.train.run.identity import (
    MADE_OF,
    FilesOf,
    agreed_over_nodes,
    require_same_run,
    run_identity,
    tell_unknown_files,
)
from vltrain.train.run.length import require_reachable
from vltrain.train.run.made_of import made_of
from vltrain.train.run.origin import Origin, find_origin, require_same_frozen, with_peft_folder
from vltrain.train.run.provenance import make_run_folder, write_provenance
from vltrain.train.run.stage import Stage, is_finished, mark_finished
from vltrain.train.trainer import Trainer, make_trainer
from vltrain.train.zero.ds_config import fill_buckets, load_ds_json, resolve_ds_config, zero_stage
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
        _require_runnable(part)
    with ExitStack() as held:
        if int(os.environ.get("RANK", "0")) == 0:
            make_run_folder(whole.folder)
            held.enter_context(one_writer(lock_inside(whole.folder), whole.folder))
            write_stages(whole)
        for part in whole.parts[1:]:
            _prepare(
                part.config,
                choose_dtype(part.config.train.precision, part.config.model.bits),
                rebuild=part.options[REBUILD] is not None,
            )
        for number, (name, part) in enumerate(zip(whole.names, whole.parts, strict=True), start=1):
            logger.info("stage %d of %d, %s: %s", number, len(whole.names), name, part.config.output)
            run(part, preemption, stage=Stage.LAST if number == len(whole.names) else Stage.EARLIER)
            gc.collect()  # the engine of a stage is a ring of references


def _require_runnable(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's JSON, after what shows a mistake before hours of preparation."""
    config = settings.config
    ds_json = load_ds_json(settings.options["ds"])
    require_source(config.data)
    stage = zero_stage(resolve_ds_config(ds_json, config, int(os.environ.get("WORLD_SIZE", "1"))))
    require_compilable(config, stage)
    _require_widenable(config, stage)
    require_loggers(config.train.loggers)
    if config.eval.scorer is not None:
        require_scorer(config)
    return ds_json


def run(settings: Settings, preemption: Preemption, stage: Stage | None = None) -> None:
    """One run of this rank, from its settings to its last evaluation. `stage`: what it is of a run in stages."""
    settings = dataclasses.replace(settings, config=with_peft_folder(settings.config))
    config = settings.config
    set_determinism(config.train.deterministic)
    ds_json = _require_runnable(settings)
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
    for pattern in ("*.partial", "ranks/*.json", "ranks/*.partial", "checkpoints/.partial-*", ".writable-*"):
        for leftover in folder.glob(pattern):
            remove(leftover)


def _train(
    settings: Settings, ds_json: dict[str, Any], folder: Path, preemption: Preemption, stage: Stage | None
) -> None:
    checkpoint = choose_checkpoint(folder, settings.options["resume"] or "auto")
    config = settings.config if checkpoint is None else as_begun(settings.config, checkpoint.belongs_to, settings.given)
    dtype = choose_dtype(
        config.train.precision, config.model.bits, checkpoint.precision if checkpoint is not None else None
    )
    # Before the process group: the model's mistakes, and those of the data, end the run before ranks wait for each
    # other.
    tokenizer, outline, dataset = _prepare(config, dtype, rebuild=settings.options[REBUILD] is not None)
    require_reachable(config, len(dataset), int(os.environ.get("WORLD_SIZE", "1")), resumed=checkpoint is not None)
    parameters, full = count_parameters(outline), outline.reference_size()
    ds_json = fill_buckets(ds_json, count_trained(outline))
    # Once on each node, whose disk may hold other files than rank 0's.
    files = made_of(config) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    origin = find_origin(config, checkpoint)
    if files is not None:
        _require_same_start(config, dataset, checkpoint, origin, files, outline)
    if stage is not None and checkpoint is not None and is_finished(folder, checkpoint):
        logger.info("%s: done already, %d steps", folder, checkpoint.step)
        return
    asked = file_digest(samples_file(config, config.data.eval_split)) if config.eval.scorer is not None else None
    rank, world_size = init_distributed()
    files = agreed_over_nodes(files)
    model = build_model(
        config.model,
        dtype=dtype,
        activation_checkpointing=config.train.activation_checkpointing,
        runs_on=device(),
        place=partitioner(resolve_ds_config(ds_json, config, world_size)),
    )
    if config.train.compile:
        compile_blocks(model)
    loggers = Loggers()
    if rank == 0:
        first_step = checkpoint.step if checkpoint is not None else 0
        context = RunContext(folder=folder, settings=as_mapping(config), first_step=first_step)
        loggers = open_loggers(config.train.loggers, context)
    trainer = make_trainer(
        config,
        ds_json,
        model=model,
        dataset=dataset,
        checkpoint=checkpoint,
        rank=rank,
        world_size=world_size,
        dtype=dtype,
        evaluate=lambda steps_done: _evaluate(trainer, tokenizer, steps_done, config.eval.max_samples, files, asked),
        loggers=loggers,
        preemption=preemption,
        made_of=files,
        origin=origin,
    )
    if rank == 0:
        resolved = dump_config(config)
        write_provenance(
            folder,
            resolved_config=resolved,
            ds_config=ds_json,
            world_size=world_size,
            parameters=parameters,
            identity=trainer.belongs_to,
            tokenizer=tokenizer.fingerprint,
            data=facts_of(config, dataset),
            full_qformer=full,
        )
        _announce(trainer, parameters, dataset, checkpoint)
        if full is not None:
            log_trainable_share(parameters, full)
    trainer.train()
    trainer.monitor.close()
    if rank == 0:
        if stage is not None:
            mark_finished(folder)
        last_line(_summary(trainer)) if stage is not Stage.EARLIER else logger.info("%s", _summary(trainer))


def _prepare(
    config: Config, dtype: torch.dtype, *, rebuild: bool
) -> tuple[Tokenizer, VisionLanguageModel, PackedDataset]:
    """Tokenizer, outline of the model, and packs, made if missing. Raises InputError where they do not fit each other,
    or are damaged."""
    tokenizer = load_tokenizer(*tokenizer_sources(config))
    outline = outline_model(config.model, device(), dtype)
    require_tokenizer_fits(config, tokenizer, outline)
    require_qformer_positions(config, outline)
    dataset = _ready_data(config, tokenizer, outline, rebuild=rebuild)
    require_positions(dataset, outline)
    return tokenizer, outline, dataset


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


def choose_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """What to go on from: `auto` the newest whole checkpoint, if any; `never` none, and none may be there; else that
    folder.

    Raises:
        InputError: the named checkpoint is damaged, none can be used, or a run would be overwritten.
    """
    root = folder / "checkpoints"
    if resume == "never":
        if checkpoints_in(root):
            raise InputError(
                f"{folder}: holds the checkpoints of a run; resume with --resume auto, choose another --output, "
                "or remove the folder"
            )
    elif resume != "auto":
        return open_checkpoint(Path(resume))
    found = newest_checkpoint(root) if resume == "auto" else None
    if found is None:
        _require_no_lost_checkpoints(folder)
    return found


def _require_no_lost_checkpoints(folder: Path) -> None:
    """Raises InputError for a run's folder whose receipt says that there were checkpoints, before it is written
    anew."""
    if not (folder / RECEIPT).exists():
        return
    done = len(read_receipt(folder / RECEIPT).lines)
    if done > unsaved_steps(folder):
        raise InputError(
            f"{folder}: its receipt has {done} steps and there is no checkpoint: they were removed or moved. "
            "Put one back; or, to train anew, choose another "
            f"--output or remove {folder / RECEIPT}"
        )


def _ready_data(config: Config, tokenizer: Tokenizer, outline: VisionLanguageModel, *, rebuild: bool) -> PackedDataset:
    """Samples and packs, made, made anew or checked.

    Raises: InputError if they are not of what the recipe names or not of one set, and for evaluations that would fail
    after the first step.
    """
    dataset = open_packs(config, tokenizer, outline.visual_tokens) if config.data.train_packs is not None else None
    evaluates = config.eval.scorer is not None
    if evaluates:
        file = ready_samples(config, config.data.eval_split, rebuild=rebuild)
        if dataset is not None and int(os.environ.get("RANK", "0")) == 0:
            require_same_set(config, dataset.folder, file)
        every, answered = answerable_samples(file, config, config.eval.max_samples)  # before hours of packing
        ask(answered, every, tokenizer, config, outline, str(file))
    if dataset is not None:
        return dataset
    return open_packs(config, tokenizer, outline.visual_tokens, rebuild=rebuild, samples_are_ready=evaluates)


def open_packs(
    config: Config, tokenizer: Tokenizer, visual_tokens: int, *, rebuild: bool = False, samples_are_ready: bool = False
) -> PackedDataset:
    """Opens the packs to train on, made first if the recipe leaves that to us.

    Args:
        rebuild, samples_are_ready: see `ready_packs`.

    Raises:
        InputError: damaged packs, packs made for another tokenizer, template or number of visual tokens, or from other
            samples than the recipe's.
    """
    if config.data.train_packs is not None:
        folder = Path(config.data.train_packs)
        made = read_made_from(folder)
        if made is not None and (changes := tokenizer_changes(made, tokenizer, config.data.template)):
            raise InputError(
                f"data.train_packs: {folder}: since they were packed, {'; '.join(changes)}; restore the "
                "tokenizer, or pack the samples again"
            )
    else:
        folder = packed_folder(config, tokenizer, visual_tokens)
        ready_packs(config, folder, tokenizer, visual_tokens, rebuild=rebuild, samples_are_ready=samples_are_ready)
    dataset = PackedDataset(folder, verify=int(os.environ.get("LOCAL_RANK", "0")) == 0)
    require_match(
        dataset.manifest,
        tokenizer_fingerprint=fingerprint(tokenizer, config.data.template),
        visual_tokens=visual_tokens,
        template=config.data.template,
        pack_length=config.data.pack_length,
    )
    _require_image_sizes(dataset, config.data.max_image_pixels)
    return dataset


def _require_image_sizes(dataset: PackedDataset, limit: int) -> None:
    """Raises InputError for an image that was packed under a larger limit and would be refused in the middle of
    training."""
    made = read_made_from(dataset.folder)
    if (
        made is None
        or made.options.get("max_image_pixels", limit) <= limit
        or int(os.environ.get("LOCAL_RANK", "0")) > 0
    ):
        return
    for number in range(dataset.manifest.num_images):
        require_size(dataset.image(number), limit, f"{dataset.folder}: image {number} of the packs")


def _evaluate(
    trainer: Trainer, tokenizer: Tokenizer, steps_done: int, max_samples: int | None, files: FilesOf, asked: str | None
) -> float | None:  # fmt: skip
    """The figure of the report on rank 0, None elsewhere. `asked`: digest of the samples when the run began."""
    config = trainer.config
    samples = samples_file(config, config.data.eval_split)
    found = file_digest(samples)
    if found != asked and trainer.rank == 0:
        logger.warning(
            "%s: was changed since the run began (a --rebuild of the same data.root?): figures before and from "
            "here on are of other questions",
            samples,
        )
    report = evaluate_split(
        trainer.engine.model,
        samples,
        tokenizer,
        config,
        split=config.data.eval_split,
        folder=trainer.folder,
        step=steps_done,
        max_samples=max_samples,
        loggers=trainer.loggers,
        device=trainer.engine.device,
        on_progress=trainer.watchdog.goes_on,
        facts={MADE_OF: files, "samples": found},
    )
    if report is None:
        return None
    trainer.monitor.headline = f"{config.data.eval_split} {report.headline()}"
    logger.info("after %d steps, %s: %s", steps_done, config.data.eval_split, report.headline())
    for line in report.lines():
        logger.warning("%s: %s", config.data.eval_split, line)
    return report.accuracy


def _summary(trainer: Trainer) -> str:
    """How the run ended, in a line."""
    loss, headline = trainer.monitor.last_loss, trainer.monitor.headline
    figures = [f"loss {loss:.4f}"] if loss is not None else []
    return ", ".join(
        [
            f"{trainer.folder}: {trainer.done} of {trainer.plan.num_steps} steps done",
            *figures,
            *([headline] if headline else []),
        ]
    )


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


def log_trainable_share(parameters: dict[str, tuple[int, int]], full: int) -> None:
    """The paper's percentages: of low-rank updates, and of everything trained, against full tuning of the Q-Former."""
    updates, trained = parameters["peft"][1], sum(trained for _, trained in parameters.values())
    told = "of full Q-Former tuning (%s): low-rank updates %s (%.2f%%), everything trained %s (%.2f%%)"
    logger.info(told, f"{full:,}", f"{updates:,}", 100 * updates / full, f"{trained:,}", 100 * trained / full)


def _announce(
    trainer: Trainer, parameters: dict[str, tuple[int, int]], dataset: PackedDataset, checkpoint: Checkpoint | None
) -> None:
    total, trainable = (sum(counts) for counts in zip(*parameters.values(), strict=True))
    parts = ", ".join(f"{part} {trained:,}" for part, (_, trained) in parameters.items() if trained)
    logger.info(
        "parameters: %s of %s are trained (%.2f%%): %s", f"{trainable:,}", f"{total:,}", 100 * trainable / total, parts
    )
    manifest = dataset.manifest
    logger.info(
        "data: %d samples in %d packs of %d tokens, %.2f%% full",
        manifest.num_samples,
        manifest.num_packs,
        manifest.pack_length,
        100 * manifest.fill,
    )
    for line in describe_lost(manifest.lost, manifest.num_samples):
        logger.warning("data: %s", line)
    logger.info(
        "run: %d steps of %d packs on %d rank(s), ZeRO stage %d, from step %d, into %s",
        trainer.plan.num_steps,
        trainer.config.train.packs_per_step,
        trainer.engine.world_size,
        trainer.engine.stage,
        checkpoint.step if checkpoint else 0,
        trainer.folder,
    )
    if "tensorboard" in trainer.config.train.loggers:
        logger.info("watch it: tensorboard --logdir %s", trainer.folder / "tensorboard")
