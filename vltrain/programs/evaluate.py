"""`vltrain evaluate` and launch/evaluate.py.

    vltrain evaluate RUN [--split test] [--checkpoint FOLDER|best|none] [--json OUT] [--eval.batch_size 64 ...]
    vltrain evaluate --predictions FILE --data FOLDER|SAMPLES [--split test] [--eval.scorer NAME] [--letters]
                     [--allow-missing] [--json OUT]

The first answers a split with a trained run, in one process or on several ranks (`--ranks N`,
`deepspeed launch/evaluate.py RUN`), each with a whole copy of the model. The second scores a file of answers without
any model: to ScienceQA's questions (--data: its official folder), or by any scorer to those of a file or folder of
samples. --letters reads "B", "(B)" and "The answer is (B)." as choices; --allow-missing leaves questions without an
answer out. Both print a table and end with the accuracy. A run's predictions and figures go into RUN/eval/SPLIT; where
that cannot be written they are printed alone, and --json writes the figures elsewhere.
"""

from __future__ import annotations

import datetime
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vltrain.config.command_line import (
    COMMAND_LINE,
    FLAGS,
    LAUNCHER_OPTIONS,
    QUIET,
    QUIETLY,
    RANKS,
    Arguments,
    Option,
    Settings,
    load_settings,
    refuse_ranks,
    split_arguments,
)
from vltrain.config.mixture import each_set
from vltrain.config.recipe import RECIPE, as_mapping
from vltrain.config.schema import Config
from vltrain.config.stages import last_stage
from vltrain.console import is_quiet, start_logging
from vltrain.data.reading import recipe_tokenizer, sample_encoder
from vltrain.distributed.hardware import device, limit_threads
from vltrain.distributed.machine import local_world_size, require_machine, require_one_model
from vltrain.distributed.preemption import Preemption
from vltrain.distributed.ranks import adopt_ranks, join_process_group, names_lost_ranks
from vltrain.errors import InputError, exits_cleanly, nearest
from vltrain.evaluate.answering.precision import loaded_dtype
from vltrain.evaluate.predictions import score_predictions
from vltrain.evaluate.ready import answerable_samples, require_scorer
from vltrain.evaluate.report import mean_of, write_mean, write_report
from vltrain.evaluate.run import ReportTo, SplitSetup, evaluate_split, mean_title
from vltrain.evaluate.scorers.scoring import Report
from vltrain.files.atomic import write_json
from vltrain.files.digest import file_digest
from vltrain.files.lock import lock_inside, one_writer
from vltrain.inference.build import answering_model
from vltrain.inference.run import choose_checkpoint, require_run, weights_before, weights_used
from vltrain.launching.run_folder import why_not_writable
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import open_loggers
from vltrain.metrics.table import require_loggers
from vltrain.models.interface import VisionLanguageModel
from vltrain.prepared.ensure_data import ensure_samples
from vltrain.prepared.origins import require_trained_set
from vltrain.train.determinism import set_determinism
from vltrain.train.run.made_of import made_of

logger = logging.getLogger(__name__)

EXAMPLES = (
    "vltrain evaluate runs/quickstart",
    "vltrain evaluate runs/quickstart --split val --checkpoint best --ranks 2",
    "vltrain evaluate --predictions answers.jsonl --data data/ScienceQA --split test",
)
RUN_OPTIONS: dict[str, Option] = {
    "ranks": RANKS,
    QUIET: QUIETLY,
    "split": Option("which split to answer; left out: the recipe's data.test_split", metavar="NAME"),
    "checkpoint": Option(
        "a checkpoint's folder, best for the one with the best evaluation (train.keep_best), or none for the "
        "model before tuning (with "
        "train.init_from: as it began); left out: the run's newest",
        metavar="{FOLDER,best,none}",
    ),
    "json": Option("also write the figures to this file", metavar="FILE"),
    "predictions": Option(
        "instead of a run: score this file of answers to the questions in --data (ScienceQA's folder, or "
        "samples and --eval.scorer); with --letters, "
        '"B" or "(B)" is a choice; with --allow-missing, questions without an answer are left out',
        metavar="FILE",
    ),
}
JOIN_TIMEOUT = datetime.timedelta(minutes=30)
FILE_FLAGS = ("letters", "allow-missing", QUIET)
FILE_OPTIONS = ("predictions", "data", "split", "json", "eval.scorer", *FILE_FLAGS)


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain evaluate") -> int:
    """Evaluates what the command line names. Returns the exit code: 0, or 2 for a mistake in the input."""
    arguments = split_arguments(argv, flags=(*FLAGS, *FILE_FLAGS))
    if arguments.last("predictions") is not None:
        json_file = arguments.last("json")
        start_logging(quiet=(QUIET, None) in arguments.options)
        _require_place(json_file)
        _finish(_evaluate_file(arguments), json_file)
        return 0
    folder = last_stage(Path(arguments.positionals[0])) if len(arguments.positionals) == 1 else None
    if folder is not None:
        require_run(folder)
    settings = load_settings(
        argv,
        program=program,
        examples=EXAMPLES,
        description="Answers a split with a trained run (of one in stages the last) and scores the answers.",
        options=RUN_OPTIONS,
        positionals=("run",),
        default_recipe=folder / RECIPE if folder else None,
        default_is_checked=True,
    )
    assert folder is not None, "load_settings asks for the run"
    refuse_ranks(settings.options)
    with (
        Preemption().listening(),
        names_lost_ranks(),
    ):  # there is nothing to save: a signal ends it at once, also in a collective
        try:
            evaluate_run(folder, settings)
            return 0
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _finish(
    report: Report, json_file: str | None, folder: Path | None = None, facts: dict[str, Any] | None = None
) -> None:
    """Shows a report, and then writes it, with `facts` (which weights answered): what took hours is on the screen,
    whatever the disk says."""
    if not is_quiet():
        for what, how in report.told.items():
            print(f"{what}: {how}")
        if report.missing:
            print(
                f"left out: {report.missing} question(s) that the file does not answer; figures are not "
                "comparable with those of the whole split"
            )
        print(report.to_markdown())
        for line in report.lines():
            print(line)
    print(report.headline(), flush=True)
    if folder is not None:
        write_report(report, folder, facts or {})
    if json_file is not None:
        write_json(Path(json_file), {**(facts or {}), **report.to_json()})


def _require_place(json_file: str | None) -> None:
    """Raises InputError if the file of --json could not be written, before hours of answering."""
    if json_file is None:
        return
    reason = why_not_writable(Path(json_file).absolute().parent) or (
        "it is a folder" if Path(json_file).is_dir() else None
    )
    if reason is not None:
        raise InputError(f"{COMMAND_LINE}: --json {json_file}: cannot be written ({reason}); name another file")


def _evaluate_file(arguments: Arguments) -> Report:
    for name, _ in arguments.options:
        if name not in (*FILE_OPTIONS, *LAUNCHER_OPTIONS):
            raise InputError(
                f"{COMMAND_LINE}: --{name} cannot be combined with --predictions, {nearest(name, FILE_OPTIONS)}"
            )
    if arguments.positionals:
        raise InputError(
            f"{COMMAND_LINE}: found '{arguments.positionals[0]}' beside --predictions, expected one of the two"
        )
    predictions, data = arguments.last("predictions"), arguments.last("data")
    assert predictions is not None
    if data is None:
        raise InputError(
            f"{COMMAND_LINE}: --predictions needs --data FOLDER, of problems.json and pid_splits.json or of "
            "prepared samples, or a file of samples"
        )
    given = dict(arguments.options)
    if Path(data).is_file() and "split" in given:
        raise InputError(
            f"{COMMAND_LINE}: --split {given['split']}: has no effect: --data names a file; leave it out, or "
            "name the file's folder"
        )
    return score_predictions(
        Path(predictions),
        Path(data),
        arguments.last("split") or "test",
        arguments.last("eval.scorer"),
        letters="letters" in given,
        allow_missing="allow-missing" in given,
    )


def evaluate_run(folder: Path, settings: Settings) -> None:
    """Answers and scores a split with a run's checkpoint, of a mixture each set's; rank 0 shows and writes the
    reports."""
    config = settings.config
    _require_place(settings.options["json"])
    sets = _evaluated_sets(config)
    require_loggers(config.train.loggers)
    set_determinism(config.train.deterministic)
    adopt_ranks()
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank, quiet=settings.options[QUIET] is not None)
    require_machine(workers=0)  # the samples' images are decoded by this process
    limit_threads(local_world_size())
    splits = {name: settings.options["split"] or one.data.test_split for name, one in sets.items()}
    checkpoint = choose_checkpoint(folder, settings.options["checkpoint"])
    facts = weights_used(folder, config, checkpoint, made_of(config), settings.overrides) if rank == 0 else {}
    if rank == 0:
        told = (
            "the model before tuning"
            if checkpoint is None
            else f"{checkpoint.path} (step {checkpoint.step}, {checkpoint.digest[:12]})"
        )
        logger.info("weights: %s", told)
    tokenizer = recipe_tokenizer(config)
    # A run's recipe bounds the evaluations while it trains; afterwards only the command line does.
    max_samples = config.eval.max_samples if "eval.max_samples" in settings.overrides else None
    files = {name: ensure_samples(one, splits[name]) for name, one in sets.items()}
    for name, one in sets.items():
        answerable_samples(files[name], one, max_samples)  # before a model is built
    if rank == 0:
        require_trained_set(folder, config, settings.overrides)
    titles = {name: f"{name}/{split}" if name else split for name, split in splits.items()}
    places = [*(f"eval/{one}" for one in titles.values()), "tensorboard"]
    reasons = [why_not_writable(folder / place) for place in places]
    reason = next((one for one in reasons if one is not None), None)
    if reason is not None:
        told = "%s: cannot be written (%s): figures are printed%s, predictions are not kept"
        logger.warning(told, folder, reason, " and written to --json" if settings.options["json"] else "")
    with ExitStack() as held:
        for place in (folder / "eval" / one for one in titles.values()) if rank == 0 and reason is None else ():
            held.enter_context(one_writer(lock_inside(place), place, remedy="evaluate another split or run meanwhile"))
        dtype = loaded_dtype(config)
        weights = checkpoint or weights_before(folder, config)
        model = answering_model(config, tokenizer, weights, dtype=dtype, place=device())
        encoder = sample_encoder(config, tokenizer, model)
        setups = [
            SplitSetup(
                split=splits[name],
                name=name,
                samples_file=files[name],
                encoder=encoder,
                config=one,
                device=device(),
                max_samples=max_samples,
            )
            for name, one in sets.items()
        ]
        step = checkpoint.step if checkpoint is not None else 0
        _answer(model, folder, settings, setups, {"step": step, **facts}, dtype=dtype, keeps=reason is None)


def _evaluated_sets(config: Config) -> dict[str, Config]:
    """Those that have a scorer. Raises InputError where none has one, or one is not installed."""
    sets = {name: one for name, one in each_set(config).items() if not name or one.eval.scorer is not None}
    for one in sets.values() or [config]:
        require_scorer(one)
    return sets


def _answer(
    model: VisionLanguageModel,
    folder: Path,
    settings: Settings,
    setups: list[SplitSetup],
    facts: dict[str, Any],
    *,
    dtype: torch.dtype,
    keeps: bool,
) -> None:
    """`facts`: which weights answer, for the reports; `keeps`: what it finds is written into the run's folder."""
    config, rank = settings.config, int(os.environ.get("RANK", "0"))
    world_size, place = int(os.environ.get("WORLD_SIZE", "1")), device()
    if world_size > 1:
        if place.type == "cuda":
            torch.cuda.set_device(place)
        join_process_group("nccl" if place.type == "cuda" else "gloo", JOIN_TIMEOUT)
        require_one_model()
    loggers = None
    if rank == 0 and keeps:
        loggers = open_loggers(config.train.loggers, RunContext(folder=folder, settings=as_mapping(config)))
    reports: dict[str, Report] = {}
    for setup in setups:
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            report = evaluate_split(model, setup, ReportTo(step=facts["step"], loggers=loggers))
        if report is not None:
            reports[setup.name] = report
            if setup.name and not is_quiet():
                print(f"{setup.title}:", flush=True)
            told = {**setup.called, **facts, "samples": file_digest(setup.samples_file)}
            json_file = None if setup.name else settings.options["json"]
            _finish(report, json_file, folder / "eval" / setup.title if keeps else None, told)
    if reports and config.data.mixture:
        _finish_sets(reports, setups, settings.options["json"], folder / "eval" if keeps else None, facts)
        if loggers is not None:
            loggers.scalars({mean_title(setups): mean_of(reports)}, facts["step"])
    if loggers is not None:
        loggers.close()


def _finish_sets(
    reports: dict[str, Report],
    setups: list[SplitSetup],
    json_file: str | None,
    folder: Path | None,
    facts: dict[str, Any],
) -> None:
    """Shows the sets' mean, and writes it."""
    print(f"unweighted mean of {len(reports)} set(s): {mean_of(reports):.4f}", flush=True)
    if folder is not None:
        write_mean(reports, folder.parent / f"{mean_title(setups)}.json", facts)
    if json_file is not None:
        sets = {name: report.to_json() for name, report in reports.items()}
        write_json(Path(json_file), {**facts, "unweighted_mean": mean_of(reports), "sets": sets})
