"""`vltrain ablate` and launch/ablate.py: trains and evaluates every row of a table of recipes, and makes the table.

    vltrain ablate TABLE.yaml [--ds ds_configs/zero2.json] [--only ROW ...] [--ranks N] [--split NAME] [--KEY VALUE ...]

TABLE.yaml is a recipe with `rows` (see `vltrain.config.recipe`), such as launch/recipes/table2.yaml, or the name of one
there. Each row is a run of its own, started as `deepspeed launch/train_mmt.py --recipe TABLE.yaml#ROW` and
`launch/evaluate.py`, in the folder ROW below the table's output.

    --ds JSON          DeepSpeed's knobs for every row
    --only ROW ...     these rows alone
    --ranks N          ranks of this machine; left out: its accelerators, or two on a CPU
    --rebuild          make prepared samples and packs that were made from something else than the recipes say anew
    --split NAME       the split to answer; left out: the table's `ablation.split`, or the recipe's data.test_split
    --KEY VALUE        overrides for all rows (vltrain train --help names them); --output: the folder of the table;
    --eval.max_samples
                       bounds the questions of every evaluation, the last one too

examples:
    vltrain ablate table2_smollm2_easyvqa --ds zero2 --only ba_8_2 ba_4_2
    vltrain ablate qformer_t5_iconqa --ds zero2 --ranks 8 --output runs/iconqa

Started again, it skips finished rows and resumes interrupted ones from their checkpoints. A row that fails is reported,
and the others run. A row with train.keep_best answers by its best checkpoint, others by their last one. After every row
the table is printed and written to table.md and table.json, and for TensorBoard's tab HPARAMS to hparams. Exit code: 0,
1 where a row failed, 2 for a mistake in the input, 130 where it was interrupted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.config.command_line import COMMAND_LINE, FLAGS, REBUILD, Arguments, Option, load_settings, split_arguments
from vltrain.config.keys import keys_of
from vltrain.config.older_runs import ADDED, value_before
from vltrain.config.recipe import Table, read_table
from vltrain.config.schema import Config
from vltrain.config.stages import value_of
from vltrain.console import start_logging
from vltrain.distributed.preemption import EXIT_REQUEUE, Preempted
from vltrain.errors import EXIT_INTERRUPTED, InputError, exits_cleanly, nearest
from vltrain.evaluate.ready import answerable_samples, require_scorer
from vltrain.files.lock import lock_inside, one_writer
from vltrain.files.strict_json import read_json
from vltrain.inference.run import recorded_identity
from vltrain.launching.launcher import default_ranks, find_program, interruptible, launch, reason_of_failure
from vltrain.prepared.ensure_data import ensure_samples
from vltrain.prepared.origins import data_identity, samples_folder
from vltrain.programs.studies.table import (
    DONE,
    FAILED,
    RUNNING,
    TRAINED,
    Outcome,
    read_outcome,
    write_hparams_table,
    write_outcome,
    write_table,
)
from vltrain.shipped import find_recipe
from vltrain.train.run.identity import MADE_OF, differences
from vltrain.train.run.made_of import made_of
from vltrain.train.run.provenance import make_run_folder
from vltrain.train.zero.ds_config import load_ds_json, resolve_ds_config

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Option] = {
    "ds": Option("DeepSpeed's knobs", metavar="JSON"),
    "only": Option("rows", metavar="ROW ..."),
    "ranks": Option("ranks", metavar="N"),
    "split": Option("split to answer", metavar="NAME"),
    REBUILD: Option("make data that does not match anew", metavar=None),
}
# Settings that change no figure of a row's line: a finished row stays finished under others.
CHANGE_NOTHING = {
    "train.hang_timeout_minutes",
    "train.async_save",
    "output",
    "model.llm.attention",
    "model.adapter.impl",
    "data.workers",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.time_limit_minutes",
    "eval.batch_size",
    "eval.max_samples",
    "eval.tensorboard_samples",
}
DATA = "samples"  # in what a row was made with: their digest, known once they are there
# These too, unless the best checkpoint is answered by, or evaluations end the training.
CHANGE_SELECTION = {"data.eval_split", "train.eval_every_steps", "train.eval_every_epochs"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row to run: its folder, the words of its two programs, the settings that make its figures what they are, and
    the split that it answers, with at most `max_samples` questions."""

    row: str
    folder: Path
    train_words: tuple[str, ...]
    evaluate_words: tuple[str, ...]
    split: str
    made_with: dict[str, Any]
    config: Config
    max_samples: int | None
    rebuild: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command line asks for. `jobs`: all rows of the table; `chosen`: those to run."""

    table: Table
    folder: Path
    jobs: tuple[Job, ...]
    chosen: tuple[str, ...]
    ranks: int
    train: Path
    evaluate: Path


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain ablate") -> int:
    """Runs the table that the command line names. Returns the exit code, see the module."""
    arguments = split_arguments(argv, flags=(*FLAGS, REBUILD))
    if ("help", None) in arguments.options:
        print(__doc__)
        return 0
    start_logging()
    plan = make_plan(arguments)
    make_run_folder(plan.folder)
    with one_writer(lock_inside(plan.folder), plan.folder), interruptible():
        return run(plan)


def run(plan: Plan) -> int:
    """Runs the chosen rows that are not done, one after another. Returns the exit code."""
    outcomes = {job.row: _settled(job) for job in plan.jobs}
    jobs = [job for job in plan.jobs if job.row in plan.chosen]
    print(_write_tables(plan, outcomes), flush=True)
    for number, job in enumerate(jobs, start=1):
        outcome = outcomes[job.row]
        title = f"row {number} of {len(jobs)}, {job.row}"
        if outcome.state == DONE:
            logger.info("%s: done already", title)
            continue
        try:
            _run_row(plan, job, outcome, title)
        except (KeyboardInterrupt, Preempted) as stop:
            _write_tables(plan, outcomes)
            logger.warning("%s: interrupted; the same command resumes from its newest checkpoint", title)
            return EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        print(_write_tables(plan, outcomes), flush=True)
    failed = [job.row for job in jobs if outcomes[job.row].state == FAILED]
    for row in failed:
        logger.error("row %s failed: %s", row, outcomes[row].reason)
    logger.info("the table: %s", plan.folder / "table.md")
    return 1 if failed else 0


def _write_tables(plan: Plan, outcomes: Mapping[str, Outcome]) -> str:
    """Writes table.md and table.json, and for rows that log to TensorBoard its table of settings and figures. Returns
    the Markdown."""
    logged = {job.row: job.config for job in plan.jobs if "tensorboard" in job.config.train.loggers}
    differing = dict.fromkeys(key for row in logged for key in plan.table.rows[row])
    settings = {
        row: {key: value_of(config, key) for key in differing if key in keys_of(config.model.architecture)}
        for row, config in logged.items()
    }
    write_hparams_table(plan.folder, settings, {row: outcomes[row] for row in logged})
    return write_table(plan.folder, plan.table.rows, outcomes)


def make_plan(arguments: Arguments) -> Plan:
    """Checks table, rows and command line before anything runs. Raises InputError naming file, row and key."""
    if not arguments.positionals:
        raise InputError(f"{COMMAND_LINE}: found no table, expected TABLE.yaml, such as launch/recipes/table2.yaml")
    table = read_table(find_recipe(arguments.positionals[0], f"{COMMAND_LINE}: table"))
    chosen = _chosen_rows(arguments, table)
    for name in ("recipe", "resume", "print_config"):
        if any(option == name for option, _ in arguments.options):
            told = f"one row by itself: vltrain train --recipe {table.recipe_of(chosen[0])} --{name} ..."
            raise InputError(f"{COMMAND_LINE}: --{name} cannot be used with a table; {told}")
    ranks = _number_of_ranks(arguments.last("ranks"))
    folder = Path(arguments.last("output") or table.settings["output"])
    jobs = tuple(_job(arguments, table, row, folder, ranks) for row in table.rows)
    programs = {
        "train": find_program(table.ablation.program, f"{table.path}: ablation.program"),
        "evaluate": find_program(table.ablation.evaluate, f"{table.path}: ablation.evaluate"),
    }
    return Plan(table=table, folder=folder, jobs=jobs, chosen=chosen, ranks=ranks, **programs)


def _chosen_rows(arguments: Arguments, table: Table) -> tuple[str, ...]:
    named = [value for option, value in arguments.options if option == "only" and value is not None]
    others = arguments.positionals[1:]  # --only a b: the parser gives `only` one word and leaves the others standing
    if others and not named:
        raise InputError(f"{COMMAND_LINE}: found '{others[0]}' behind the table, expected --only {' '.join(others)}")
    for row in (*named, *others):
        if row not in table.rows:
            raise InputError(f"{COMMAND_LINE}: --only: no row '{row}' in {table.path}, {nearest(row, table.rows)}")
    return tuple(row for row in table.rows if not named or row in named or row in others)


def _number_of_ranks(text: str | None) -> int:
    if text is None:
        return default_ranks()
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise InputError(f"{COMMAND_LINE}: --ranks: found {text!r}, expected a number of 1 or more")
    return int(text)


def _job(arguments: Arguments, table: Table, row: str, folder: Path, ranks: int) -> Job:
    overrides = tuple(
        f"--{name}={value}" for name, value in arguments.options if name not in OPTIONS and name != "output"
    )
    recipe = ("--recipe", str(table.recipe_of(row)), "--output", str(folder / row))
    try:
        config = load_settings([*recipe, *overrides], program="vltrain ablate", options=OPTIONS).config
        require_scorer(config)
    except InputError as error:
        raise InputError(f"{error} (row '{row}' of {table.path})") from None
    ds = arguments.last("ds")
    resolve_ds_config(load_ds_json(ds), config, ranks)
    split = arguments.last("split") or table.ablation.split or config.data.test_split
    bounded = arguments.last("eval.max_samples") is not None
    max_samples = config.eval.max_samples if bounded else table.ablation.max_samples
    bound = () if max_samples is None else ("--eval.max_samples", str(max_samples))
    best = ("--checkpoint", "best") if config.train.keep_best else ()
    rebuild = (REBUILD, None) in arguments.options
    return Job(
        row=row,
        folder=folder / row,
        train_words=(*recipe, *overrides, *(("--ds", ds) if ds else ()), *(("--rebuild",) if rebuild else ())),
        evaluate_words=(str(folder / row), "--split", split, *best, *bound),
        split=split,
        made_with={**_figures(config), "split": split, "questions": max_samples},
        config=config,
        max_samples=max_samples,
        rebuild=rebuild,
    )


def _figures(config: Config) -> dict[str, Any]:
    """The settings by dotted name, as they come back from JSON, that a row's figures depend on."""
    values: dict[str, Any] = {}
    selects = config.train.keep_best or config.train.early_stopping_patience is not None
    for key in keys_of(config.model.architecture).keys() - CHANGE_NOTHING - (set() if selects else CHANGE_SELECTION):
        values[key] = value_of(config, key)
    return json.loads(json.dumps(values))


def _settled(job: Job) -> Outcome:
    """What is on the disk of a row. Raises InputError if other settings made it: a table compares only what is
    comparable."""
    outcome = read_outcome(job.folder)
    if outcome.state not in (DONE, TRAINED):
        return outcome
    for key, value in sorted(job.made_with.items()):
        before = outcome.made_with.get(key, json.loads(json.dumps(value_before(key))))
        if before != value:
            found = f"{key} was {before!r}, is {value!r}"
            again = f"go on as it was (--{key} {before}), " if key in ADDED else ""
            raise InputError(
                f"{job.folder}: holds row '{job.row}' of other settings: {found}; {again}choose another "
                "--output, or remove it"
            )
    _require_same_files(job)
    data = data_identity(job.config, job.split)
    if data is not None and outcome.made_with.get(DATA, data) != data:
        found = f"{samples_folder(job.config)} has other samples now than it was trained and answered on"
        raise InputError(
            f"{job.folder}: holds row '{job.row}' of other data: {found}; choose another --output, or remove it"
        )
    return outcome


def _require_same_files(job: Job) -> None:
    """Raises InputError if the row was made over other weights than those that are there for the other rows."""
    identity = recorded_identity(job.folder)
    if MADE_OF not in identity:
        return
    try:
        files = made_of(job.config)
    except InputError as error:  # a table can be read on where the weights are not
        logger.warning("row %s: cannot check whether its weights have changed (%s)", job.row, error)
        return
    changed = list(differences({MADE_OF: identity[MADE_OF]}, {MADE_OF: files}))
    if changed:
        raise InputError(
            f"{job.folder}: holds row '{job.row}' over other weights: {'; '.join(changed)}; choose another "
            "--output, or remove it"
        )


def _run_row(plan: Plan, job: Job, outcome: Outcome, title: str) -> None:
    """Trains and evaluates a row, keeping `outcome` and its file up to date. KeyboardInterrupt and Preempted pass
    through."""
    make_run_folder(job.folder)
    if outcome.state != TRAINED:
        outcome.state, outcome.reason, outcome.made_with = RUNNING, None, job.made_with
        if not _can_be_answered(job, outcome, title):
            return
        outcome.made_with = {**job.made_with, DATA: data_identity(job.config, job.split)}
        if not _run_program("train", plan.train, job.train_words, plan.ranks, job, outcome, title):
            return
        outcome.state = TRAINED
    if not _run_program("evaluate", plan.evaluate, job.evaluate_words, plan.ranks, job, outcome, title):
        return
    facts = _read(job.folder / "run.json")
    parameters, outcome.full_qformer = facts["parameters"].values(), facts.get("full_qformer")
    outcome.parameters, outcome.trained = (sum(part[name] for part in parameters) for name in ("total", "trainable"))
    outcome.metrics = _read(job.folder / "eval" / job.split / "metrics.json")
    outcome.steps, outcome.state = outcome.metrics["step"], DONE
    write_outcome(job.folder, outcome)


def _can_be_answered(job: Job, outcome: Outcome, title: str) -> bool:
    """Whether the split that the row will answer is there and fits its scorer, asked before hours of training; if not,
    `outcome` says why."""
    try:
        answerable_samples(ensure_samples(job.config, job.split, rebuild=job.rebuild), job.config, job.max_samples)
    except InputError as error:
        outcome.state, outcome.reason = FAILED, str(error)
        logger.error("%s: %s", title, error)
        write_outcome(job.folder, outcome)
        return False
    return True


def _run_program(
    name: str, program: Path, words: tuple[str, ...], ranks: int, job: Job, outcome: Outcome, title: str
) -> bool:
    """Runs one of a row's two programs; its output goes to NAME.log. Returns whether it succeeded; if not, `outcome`
    says why."""
    log = job.folder / f"{name}.log"
    write_outcome(job.folder, outcome)
    logger.info("%s: %s on %d rank(s); watch it: tail -f %s", title, name, ranks, log)
    started, code = time.monotonic(), None
    try:
        code = launch(program, words, ranks, log)
    finally:
        spent = time.monotonic() - started
        outcome.seconds += spent if name == "train" else 0.0
        outcome.evaluation_seconds = spent if name == "evaluate" else outcome.evaluation_seconds
        if code and code not in (EXIT_REQUEUE, EXIT_INTERRUPTED):
            outcome.state, outcome.reason = (
                FAILED,
                f"{name} ended with exit code {code}: {reason_of_failure(log)} (whole output: {log})",
            )
            logger.error("%s: %s", title, outcome.reason)
        write_outcome(job.folder, outcome)
    if code in (EXIT_REQUEUE, EXIT_INTERRUPTED):
        raise Preempted(f"{name} was asked to leave", code)
    return code == 0


def _read(path: Path) -> Any:
    """A file that a row's program has just written."""
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(
            f"{path}: cannot be read ({error}), though the row's program ended well; is its output folder this one?"
        ) from None
