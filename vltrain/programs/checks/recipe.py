"""`vltrain check recipe RECIPE`: what a run of the recipe would be, tried on its own packs, model, kernels and ranks,
without training.

What `vltrain train` makes before its first step (samples, packs, kept features) is made where it would be; nothing else
is left behind.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence

from vltrain.config.command_line import COMMAND_LINE, QUIET, REBUILD, TRAIN_OPTIONS, Settings, refuse_ranks
from vltrain.config.mixture import sets_of
from vltrain.config.schema import Config
from vltrain.config.stages import load_stages, refuse_untuned
from vltrain.console import logged_from, start_logging
from vltrain.data.report.finding import FAILED, Finding
from vltrain.data.report.packed import LABELS
from vltrain.data.report.report import data_report
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import MixedPacks
from vltrain.data.text.encoder import SampleEncoder
from vltrain.distributed.broadcast import from_rank_0
from vltrain.distributed.hardware import choose_dtype, limit_threads
from vltrain.distributed.machine import local_world_size, require_machine
from vltrain.distributed.preemption import Preemption
from vltrain.distributed.ranks import adopt_ranks, names_lost_ranks
from vltrain.errors import InputError
from vltrain.evaluate.questions import judge_of
from vltrain.memory.out_of_memory import OutOfMemory
from vltrain.memory.plan import largest_pack
from vltrain.models.build import count_trained
from vltrain.preflight.check import check
from vltrain.preflight.labels import label_masks
from vltrain.prepared.training_data import ensure_training_data
from vltrain.programs.checks.ways_out import planned_memory, ways_out
from vltrain.programs.train import assemble, require_runnable
from vltrain.train.determinism import set_determinism
from vltrain.train.make_trainer import RunStart
from vltrain.train.planning.planned import Way
from vltrain.train.run.identity import agreed_over_nodes
from vltrain.train.run.made_of import made_of
from vltrain.train.run.origin import find_origin, with_peft_folder
from vltrain.train.zero.ds_config import fill_in
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Tries what a run of the recipe would be, on its own packs, model, kernels and ranks, and proves it right; nothing "
    "is trained."
)
EXAMPLES = (
    "vltrain check recipe quickstart --ds zero2 --ranks 2",
    "vltrain check recipe smollm2_scienceqa --ds zero3 --ranks 8 --data.pack_length 2048",
)
OPTIONS = {name: one for name, one in TRAIN_OPTIONS.items() if name != "resume"}
EXIT_FAILED = 1


def check_recipe(argv: Sequence[str], program: str = "vltrain check recipe") -> int:
    """The exit code: 0, or 1 where something fails.

    Raises: InputError for a mistake in the input, as `vltrain train` does.
    """
    adopt_ranks()
    words = [number for number, word in enumerate(argv) if not word.startswith("--")][:1]
    if words == [0]:
        argv = ["--recipe", *argv]
    whole = load_stages(list(argv), program=program, description=DESCRIPTION, options=OPTIONS, examples=EXAMPLES)
    if whole.parts[0].recipe is None:
        raise InputError(f"{COMMAND_LINE}: found no recipe, expected a file or a name of launch/recipes")
    refuse_ranks(whole.parts[0].options)
    refuse_untuned(whole)
    start_logging(int(os.environ.get("RANK", "0")), quiet=whole.parts[0].options[QUIET] is not None)
    require_machine(workers=0)
    limit_threads(local_world_size())
    code = 0
    with names_lost_ranks():
        try:
            for number, part in enumerate(whole.parts):
                title = f"{whole.names[number]}: " if whole.names else ""
                code = max(code, _check(_alone(part, is_later=number > 0), title))
                gc.collect()
        finally:
            shutdown_distributed()
    return code


def _alone(settings: Settings, *, is_later: bool) -> Settings:
    """Of a stage that begins with what one before it has trained: with fresh weights instead, of the same shapes."""
    config = with_peft_folder(settings.config)
    train = dataclasses.replace(config.train, loggers=(), **({"init_from": None} if is_later else {}))
    return dataclasses.replace(settings, config=dataclasses.replace(config, train=train))


def _data_reports(config: Config, dataset: PackedDataset, encoder: SampleEncoder) -> list[Finding]:
    """Of the data, of a mixture each set's."""
    if not isinstance(dataset, MixedPacks):
        return data_report(config, dataset, encoder, judge_of(config))
    return [
        dataclasses.replace(found, what=f"{name}: {found.what}")
        for name, one in sets_of(config).items()
        for found in data_report(one, dataset.sets[name], encoder, judge_of(one))
    ]


def _check(settings: Settings, title: str) -> int:
    config = settings.config
    set_determinism(config.train.deterministic)
    raw = require_runnable(settings)
    dtype = choose_dtype(config.train.precision, config.model.bits)
    encoder, outline, dataset = ensure_training_data(config, dtype, rebuild=settings.options[REBUILD] is not None)
    first = int(os.environ.get("RANK", "0")) == 0
    of_data = _data_reports(config, dataset, encoder) if first else []
    ds_json = fill_in(raw, count_trained(outline), outline.llm_block_classes)
    files = made_of(config) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    origin = find_origin(config, None)
    rank, world_size = init_distributed()
    if from_rank_0(any(one.status == FAILED and one.what.rpartition(": ")[2] == LABELS for one in of_data)):
        return _shown(of_data, title)  # what the model made of such packs would say nothing
    pack = largest_pack(config, outline.visual_tokens, dataset)
    way = Way(config=config, ds_json=raw, num_gpus=world_size, dtype=dtype, pack=pack, packs=dataset)
    folder = from_rank_0(tempfile.mkdtemp(prefix="vltrain-check-") if rank == 0 else None)
    try:
        with logged_from(logging.WARNING, "vltrain.receipts"):
            trainer = assemble(
                dataclasses.replace(config, output=folder),
                ds_json,
                world_size,
                dataset,
                RunStart(dtype=dtype, origin=origin, made_of=agreed_over_nodes(files)),
                None,
                Preemption(),
                settings.given,
            )
        try:
            findings = check(trainer, everything=True)
            findings += [planned_memory(way), *label_masks(trainer, encoder.tokenizer)] if rank == 0 else []
        except OutOfMemory as error:  # the others wait for this rank, and are ended with it
            lines = [Finding(status=FAILED, what="memory", found=str(error)), *ways_out(way), *of_data]
            print("\n".join(f"{title}{one.line()}" for one in lines), flush=True)
            return EXIT_FAILED
        finally:
            trainer.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _shown([*findings, *of_data], title)


def _shown(own: list[Finding], title: str) -> int:
    """Rank 0 shows its lines. Returns the exit code, the same on all ranks. A collective."""
    lines = from_rank_0(own)
    if int(os.environ["RANK"]) == 0:
        print("\n".join(f"{title}{one.line()}" for one in lines), flush=True)
    return EXIT_FAILED if any(one.status == FAILED for one in lines) else 0
