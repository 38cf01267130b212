"""Puts a run together: plan, engine, loader, monitor and what a checkpoint holds of them, into a `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vltrain.config.mixture import each_set
from vltrain.config.schema import Config
from vltrain.data.kept.store import KeptImages
from vltrain.data.loader import StepLoader
from vltrain.data.pictures import ImageReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.reading import image_reader
from vltrain.data.sample_files import samples_file
from vltrain.data.shards import PackedDataset
from vltrain.distributed.broadcast import from_rank_0
from vltrain.distributed.hardware import device, peak_flops
from vltrain.distributed.preemption import Preemption
from vltrain.errors import InputError
from vltrain.metrics.base import MetricLogger
from vltrain.metrics.categories import CategoryLosses
from vltrain.metrics.loggers import Loggers
from vltrain.metrics.monitor import Monitor
from vltrain.metrics.sets import SetFigures
from vltrain.metrics.step_log import truncate_jsonl
from vltrain.models.build import count_trained
from vltrain.models.flops import Flops
from vltrain.models.interface import VisionLanguageModel
from vltrain.receipts.history import HistoryWriter, read_history
from vltrain.receipts.receipt import Header, ReceiptWriter
from vltrain.train.adalora import RankAllocator
from vltrain.train.balance import balanced
from vltrain.train.checkpoints.checkpoint import Checkpoint, load_trainable
from vltrain.train.checkpoints.selection import BestTracker, measured_by
from vltrain.train.guard import QUARANTINE
from vltrain.train.kept_features import kept_images
from vltrain.train.optim import parameter_groups
from vltrain.train.run.fits import kept_image_part, run_flops
from vltrain.train.run.identity import FilesOf, require_same_run, run_id, run_identity
from vltrain.train.run.origin import Origin
from vltrain.train.trainer import Trainer
from vltrain.train.zero.ds_config import offloads_optimizer, resolve_ds_config
from vltrain.train.zero.engine import Engine, gathered
from vltrain.train.zero.frozen import FrozenWeights


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What a run begins with, or goes on from.

    Args:
        dtype: of matrix products.
        checkpoint: its own, to go on from; None: it begins.
        origin: of `train.init_from`: whose weights the run begins with, or began with.
        made_of: digests of the files that weights and tokenizer come from; None: they are not known, and not compared.
    """

    dtype: torch.dtype
    checkpoint: Checkpoint | None = None
    origin: Origin | None = None
    made_of: FilesOf | None = None

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return self.checkpoint.step if self.checkpoint is not None else 0

    @property
    def run_state(self) -> dict[str, Any]:
        """As `Trainer.run_state` left it; {} of a run that begins."""
        return self.checkpoint.run_state if self.checkpoint is not None else {}


def make_trainer(
    config: Config,
    ds_json: dict[str, Any],
    *,
    model: VisionLanguageModel,
    dataset: PackedDataset,
    start: RunStart,
    evaluate: Callable[[int], float | None],
    loggers: MetricLogger | None = None,
    preemption: Preemption | None = None,
) -> Trainer:
    """A trainer at the run's first step, or at its checkpoint's. In the process group of `init_distributed`.

    Args:
        evaluate: see `Trainer.evaluate`.
        loggers: get the run's metrics, on rank 0; None: nobody does.
        preemption: of the program; None: this rank hears no signal.

    Raises: InputError where DeepSpeed's JSON contradicts the recipe, or the checkpoint is of another run or model.
    """
    assert (start.origin is None) == (config.train.init_from is None), "whoever makes a trainer finds its origin"
    folder, rank, loggers = Path(config.output), dist.get_rank(), loggers or Loggers()
    belongs_to = run_identity(config, dataset, start.made_of, start.origin.facts if start.origin else None)
    ds_config = resolve_ds_config(ds_json, config, dist.get_world_size(), count_trained(model), model.llm_block_classes)
    _load_start(model, start, belongs_to, folder)
    reader, flops = image_reader(config, model), run_flops(config, model)  # before ZeRO-3 has its parameters
    part = kept_image_part(config, model, dataset)
    cost = pack_cost(flops, dataset)
    plan = make_plan(config, dataset, cost, offloads_optimizer(ds_config) or not model.trains_on_text)
    engine = _make_engine(config, model, ds_config, start)
    kept = kept_images(config, engine, dataset, reader, part)
    plan, measured = balanced(config, plan, cost, engine, dataset, reader, kept, start.run_state)
    allocator = make_allocator(config, engine, plan, start.checkpoint)
    frozen = FrozenWeights(model, engine.device)
    run = run_id(belongs_to, start.checkpoint)
    receipt = _open_receipt(config, start, receipt_header(config, plan, dataset, run, frozen.digests()))
    return Trainer(
        config=config,
        folder=folder,
        rank=rank,
        engine=engine,
        plan=plan,
        loader=_make_loader(config, dataset, plan, reader, kept, start),
        loggers=loggers,
        monitor=_make_monitor(config, loggers, plan, flops, start),
        receipt=receipt,
        frozen=frozen,
        history=_open_history(config, dataset, start, receipt.run),
        by_category=_losses_by_category(config, dataset, plan, start.first_step),
        sets=SetFigures(plan, dataset.index, start.first_step),
        best=_best_so_far(config, start),
        belongs_to=belongs_to,
        evaluate=evaluate,
        first_step=start.first_step,
        guard_state=start.run_state.get("guard"),
        measured_cost=measured,
        allocator=allocator,
        preemption=preemption or Preemption(),
    )


def pack_cost(flops: Flops, packs: PackedDataset | None = None) -> PackCost:
    """What a pack costs, in FLOPs, for assigning packs to ranks. Label positions are few and left out. `packs` say how
    large their images are; without them all are of one size."""
    images = partial(packs.images_of_size, flops.image) if packs is not None and flops.image.tokens else None
    return PackCost(per_token=flops.per_token, per_pair=flops.per_pair, per_image=flops.per_image, images=images)


def make_plan(config: Config, dataset: PackedDataset, cost: PackCost, images_always: bool) -> Plan:
    """Which packs each step and rank takes. `images_always`: see `Plan`."""
    return Plan(
        dataset.index,
        seed=config.train.seed,
        epochs=config.train.epochs,
        packs_per_step=config.train.packs_per_step,
        world_size=dist.get_world_size(),
        cost=cost,
        max_steps=config.train.max_steps,
        images_always=images_always,
    )


def _make_engine(config: Config, model: VisionLanguageModel, ds_config: dict[str, Any], start: RunStart) -> Engine:
    """The engine around the model, with the optimizer as it was at the checkpoint."""
    engine = Engine(
        model,
        parameter_groups(model.named_parameters(), config.optim, model.part_of),
        ds_config,
        betas=config.optim.betas,
        eps=config.optim.eps,
        autocast_dtype=start.dtype,
    )
    if start.checkpoint is not None:
        # AdamW's own count of steps, for its bias correction, has no skipped ones.
        skipped = start.run_state.get("guard", {}).get("num_skipped", 0)
        engine.load_optimizer_state(start.checkpoint.optimizer_states(), start.first_step - skipped)
    return engine


def _make_loader(
    config: Config, dataset: PackedDataset, plan: Plan, reader: ImageReader, kept: KeptImages | None, start: RunStart
) -> StepLoader:
    return StepLoader(
        dataset,
        plan,
        dist.get_rank(),
        reader,
        workers=config.data.workers,
        start_step=start.first_step,
        pin_memory=device().type == "cuda",
        kept=kept,
    )


def _make_monitor(config: Config, loggers: MetricLogger, plan: Plan, flops: Flops, start: RunStart) -> Monitor:
    return Monitor(
        Path(config.output),
        loggers,
        active=dist.get_rank() == 0,
        first_step=start.first_step,
        num_steps=plan.num_steps,
        log_every_steps=config.train.log_every_steps,
        flops=flops,
        peak_flops=peak_flops(start.dtype) * dist.get_world_size(),
    )


def _load_start(model: VisionLanguageModel, start: RunStart, belongs_to: dict[str, Any], folder: Path) -> None:
    """Gives the model the weights that it starts with now. A collective."""
    checkpoint, origin = start.checkpoint, start.origin
    if checkpoint is not None:
        require_same_run(checkpoint, belongs_to)
    first_step, digest = start.first_step, origin.facts["digest"] if origin else None
    if from_rank_0((first_step, digest)) != (first_step, digest):
        found = f"rank {dist.get_rank()} goes on from step {first_step}"
        found += f" with the weights {digest[:12]}" if digest else ""
        raise InputError(
            f"{found}, rank 0 does not: they see different checkpoints in {folder}; start again, or name one "
            "with --resume"
        )
    loaded = checkpoint or (origin.checkpoint if origin else None)
    if loaded is not None:
        load_trainable(model, loaded, gathered)


def _best_so_far(config: Config, start: RunStart) -> BestTracker:
    best = BestTracker(patience=config.train.early_stopping_patience, measured_by=measured_by(config))
    if "selection" in start.run_state:
        best.load(start.run_state["selection"])
    return best


def _open_receipt(config: Config, start: RunStart, header: Header) -> ReceiptWriter:
    """The receipt, and the quarantine beside it, without the steps that are done again."""
    folder, is_writer = Path(config.output), dist.get_rank() == 0
    if is_writer and (folder / QUARANTINE).exists():
        truncate_jsonl(folder / QUARANTINE, start.first_step)
    return ReceiptWriter(
        folder,
        header,
        active=is_writer,
        first_step=start.first_step,
        head=start.run_state.get("receipt"),
    )


def _open_history(config: Config, dataset: PackedDataset, start: RunStart, run: str) -> HistoryWriter:
    """`run`: of the receipt."""
    told = {"active": dist.get_rank() == 0, "first_step": start.first_step}
    return HistoryWriter(Path(config.output), run=run, data=dataset.manifest.checksum, **told)


def _losses_by_category(config: Config, dataset: PackedDataset, plan: Plan, first_step: int) -> CategoryLosses:
    """Of rank 0. To be made when the history is open."""

    def ids_of(step: int) -> list[str]:
        return [name for pack in plan.packs_of(step).tolist() for name in dataset.sample_ids(pack)]

    every, samples = config.train.log_every_steps, dict[str, Path]()
    for name, one in each_set(config).items():
        with suppress(InputError):  # own packs need not have samples beside them
            samples[f"{name}/" if name else ""] = samples_file(one, one.data.train_split)
    samples = {before: file for before, file in samples.items() if file.is_file()}
    if dist.get_rank() != 0 or not samples:
        return CategoryLosses({}, ids_of, every=every)
    history = read_history(Path(config.output))
    steps = range(max(history.first_step, first_step - first_step % every), first_step)
    recent = [history.losses(step) for step in steps]
    return CategoryLosses(samples, ids_of, every=every, first_step=first_step, recent=recent)


def make_allocator(config: Config, engine: Engine, plan: Plan, checkpoint: Checkpoint | None) -> RankAllocator | None:
    """AdaLoRA's, where the recipe has it, as it was at the checkpoint. Raises InputError if its schedule is longer than
    the run."""
    if config.model.adalora is None:
        return None
    allocator = RankAllocator(engine, config.model.adalora, plan.num_steps)
    if checkpoint is not None:
        allocator.load(checkpoint.extra())
    return allocator


def receipt_header(
    config: Config, plan: Plan, dataset: PackedDataset, run: str, frozen: dict[str, str] | None = None
) -> Header:
    """What a run's receipt begins with. `run`: of `vltrain.train.run.identity.run_id`; `frozen`: of `FrozenWeights`."""
    train = config.train
    return Header(
        run=run,
        data=dataset.manifest.checksum,
        packs=dataset.place,
        seed=train.seed,
        epochs=train.epochs,
        packs_per_step=train.packs_per_step,
        num_steps=plan.num_steps,
        frozen=frozen,
    )
