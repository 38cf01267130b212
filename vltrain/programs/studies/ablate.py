"""`vltrain ablate` and launch/ablate.py: trains and evaluates every row of a table of recipes, and makes the table.

    vltrain ablate TABLE.yaml [--ds ds_configs/zero2.json] [--only ROW ...] [--seeds N [--against ROW]] [--ranks N]
                   [--split NAME] [--KEY VALUE ...]

TABLE.yaml is a recipe with `rows` (see `vltrain.config.recipe`), such as launch/recipes/table2.yaml, or the name of one
there. Each row is a run of its own, started as `deepspeed launch/train_mmt.py --recipe TABLE.yaml#ROW` and
`launch/evaluate.py`, in the folder ROW below the table's output; or a file of answers, which is scored. Figures that
were published stand beside one's own.

    --ds JSON          DeepSpeed's knobs for every row
    --only ROW ...     these rows alone
    --seeds N          each row with N seeds (train.seed, model.seed, with data.fraction data.fraction_seed; counted
                       up from the recipe's): mean, standard deviation, 95% interval; runs in ROW/seed-NUMBER, all rows
                       with the first seed, then the next; begun with fewer, the others are added
    --against ROW      which row the others are tested against, or best; left out: `ablation.against`, or the first
    --plan             run nothing: what each row would take, by vltrain plan (--gpus N --card NAME --utilisation SHARE
                       --bandwidth GB/S), is kept in planned.json and shown in the table
    --ranks N          ranks of this machine; left out: its accelerators, or two on a CPU
    --rebuild          make prepared samples and packs that were made from something else than the recipes say anew
    --split NAME       the split to answer; left out: the table's `ablation.split`, or the recipe's data.test_split
    --KEY VALUE        overrides for all rows (vltrain train --help names them); --output: the folder of the table;
    --eval.max_samples
                       bounds the questions of every evaluation, the last one too

examples:
    vltrain ablate table2_smollm2_easyvqa --ds zero2 --only ba_8_2 ba_4_2
    vltrain ablate table2_smollm2_easyvqa --ds zero2 --seeds 5 --against ba_16_2
    vltrain ablate qformer_t5_iconqa --ds zero2 --ranks 8 --output runs/iconqa

Started again, it skips finished rows and resumes interrupted ones from their checkpoints. A row that fails is reported,
and the others run. Rows of `ablation.untuned` answer as they are before tuning, and are neither trained nor planned. A
row with train.keep_best answers by its best checkpoint, others by their last one. After every row the table is printed
and written to table.md and table.json, and for TensorBoard's tab HPARAMS to hparams; below it which rows differ, by
paired tests over seeds and over the questions. Exit code: 0, 1 where a row failed, 2 for a mistake in the input, 130
where it was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vltrain.config.command_line import FLAGS, REBUILD, split_arguments
from vltrain.config.keys import keys_of
from vltrain.config.mixture import each_set, of_set
from vltrain.config.stages import value_of
from vltrain.console import start_logging
from vltrain.distributed.preemption import EXIT_REQUEUE, Preempted
from vltrain.errors import EXIT_INTERRUPTED, InputError, exits_cleanly
from vltrain.evaluate.ready import answerable_samples
from vltrain.files.lock import lock_inside, one_writer
from vltrain.files.strict_json import read_json
from vltrain.inference.untuned import write_untuned_run
from vltrain.launching.launcher import interruptible, launch, reason_of_failure
from vltrain.prepared.ensure_data import ensure_samples
from vltrain.programs.studies.answers import score_files
from vltrain.programs.studies.comparison import Comparison, Run, Seed, compare
from vltrain.programs.studies.planned import plan_row, read_planned, write_planned
from vltrain.programs.studies.published import published_lines
from vltrain.programs.studies.rows import BEST, DATA, Job, Plan, absent_weights, make_plan, settled
from vltrain.programs.studies.sets import answers_folder, identities, row_metrics, runs_by_set
from vltrain.programs.studies.table import (
    DONE,
    FAILED,
    RUNNING,
    TRAINED,
    WAITING,
    Beside,
    Outcome,
    pooled_rows,
    write_hparams_table,
    write_outcome,
    write_table,
)
from vltrain.train.run.provenance import make_run_folder

logger = logging.getLogger(__name__)


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain ablate") -> int:
    """Runs the table that the command line names. Returns the exit code, see the module."""
    arguments = split_arguments(argv, flags=(*FLAGS, REBUILD, "plan"))
    if ("help", None) in arguments.options:
        print(__doc__)
        return 0
    start_logging()
    plan = make_plan(arguments)
    make_run_folder(plan.folder)
    with one_writer(lock_inside(plan.folder), plan.folder), interruptible():
        return run(plan)


def run(plan: Plan) -> int:
    """Runs the chosen rows that are not done, one after another; with seeds, all rows with the first of them, then with
    the next. Files of answers are scored before. Returns the exit code."""
    outcomes = {job.name: settled(job) for job in plan.jobs}
    if plan.table.predictions is not None:
        outcomes |= score_files(plan.table.predictions, plan.split, plan.folder)
    if plan.planning is not None:
        _plan_rows(plan, plan.planning)
    print(_write_tables(plan, outcomes), flush=True)
    jobs = [job for job in plan.jobs if job.row in plan.chosen and plan.planning is None]
    for number, job in enumerate(jobs, start=1):
        outcome = outcomes[job.name]
        title = f"{'row' if job.seed is None else 'run'} {number} of {len(jobs)}, {job.name}"
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
    named = [*(row for row in plan.chosen if row in plan.table.files), *(job.name for job in jobs)]
    failed = [name for name in named if outcomes[name].state == FAILED]
    for name in failed:
        logger.error("row %s failed: %s", name, outcomes[name].reason)
    logger.info("the table: %s", plan.folder / "table.md")
    return 1 if failed else 0


def _plan_rows(plan: Plan, options: Sequence[str]) -> None:
    """Plans the chosen rows. Raises InputError naming the row that cannot be."""
    planned, known = read_planned(plan.folder), dict[str, dict[str, Any]]()
    rows = [row for row in plan.chosen if row in plan.table.rows and row not in plan.table.ablation.untuned]
    for number, row in enumerate(rows, start=1):
        config = next(job.config for job in plan.jobs if job.row == row)
        logger.info("planning row %d of %d, %s", number, len(rows), row)
        try:
            recipe = str(plan.table.recipe_of(row))
            planned[row] = plan_row(config, recipe, plan.overrides, options, plan.table.ablation.packs, known)
        except InputError as error:
            raise InputError(f"{error} (row '{row}' of {plan.table.path})") from None
    write_planned(plan.folder, planned)


def _write_tables(plan: Plan, outcomes: Mapping[str, Outcome]) -> str:
    """Writes table.md and table.json, and for rows that log to TensorBoard its table of settings and figures. Returns
    the Markdown."""
    table = plan.table
    runs: dict[str, dict[Seed, Outcome]] = {row: {} for row in table.lines}
    for job in plan.jobs:
        runs[job.row][job.seed] = outcomes[job.name]
    runs |= {row: {None: outcomes[row]} for row in table.files}
    logged = {job.row: job.config for job in plan.jobs if "tensorboard" in job.config.train.loggers}
    differing = dict.fromkeys(key for row in logged for key in table.rows[row])
    settings = {
        row: {key: value_of(config, key) for key in differing if key in keys_of(config.model.architecture)}
        for row, config in logged.items()
    }
    write_hparams_table(plan.folder, settings, runs)
    differences: dict[str, dict[str, Any]] = {}
    for row in table.lines:
        base = {"base": table.bases[row]} if row in table.bases else {}
        differences[row] = {"answers": str(table.files[row])} if row in table.files else {**base, **table.rows[row]}
    return write_table(plan.folder, differences, runs, _beside(plan, outcomes, runs))


def _beside(plan: Plan, outcomes: Mapping[str, Outcome], runs: Mapping[str, Mapping[Seed, Outcome]]) -> Beside:
    rows, _ = pooled_rows(runs)
    states = {row: outcome.state for row, outcome in rows.items() if outcome.state != DONE}
    for job in plan.jobs:
        if states.get(job.row) in (WAITING, FAILED) and absent_weights(job.config):
            states[job.row] = "weights not here"
    planned, published = read_planned(plan.folder), plan.table.published
    sections: list[tuple[str, list[list[str]], int]] = []
    records: dict[str, Any] = {}
    if published is not None:
        title = f"Published ({published.source}), in per cent, and one's own below:"
        sections.append((title, published_lines(published, rows, states, planned), 2))
        records["published"] = {"source": published.source, "rows": published.figures}
    comparisons = _comparisons(plan, outcomes)
    for name, comparison in comparisons.items():
        title, lines = comparison.to_table()
        sections.append((f"{name}: {title}" if name else title, lines, 1))
    if "" in comparisons:
        records["comparison"] = comparisons.pop("").to_json()
    if comparisons:
        records["comparison_by_set"] = {name: comparison.to_json() for name, comparison in comparisons.items()}
    return Beside(states=states, planned=planned, sections=sections, records=records)


def _comparisons(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Comparison]:
    """By set, of those that have it; of rows without a mixture under no name."""
    runs: dict[str, dict[str, dict[Seed, Run]]] = {}
    answered = [(job.name, job.row, job.seed, job.folder, job.splits) for job in plan.jobs]
    answered += [(row, row, None, plan.folder / row, {"": plan.split}) for row in plan.table.files]
    for name, row, seed, folder, splits in answered:
        if outcomes[name].state == DONE:
            for one, run in runs_by_set(outcomes[name].metrics, folder, splits).items():
                runs.setdefault(one, {row: {} for row in plan.table.lines})[row][seed] = run
    compared = {name: compare(by_row, plan.against, best=plan.against == BEST) for name, by_row in runs.items()}
    return {name: comparison for name, comparison in compared.items() if comparison is not None}


def _run_row(plan: Plan, job: Job, outcome: Outcome, title: str) -> None:
    """Trains and evaluates a row, keeping `outcome` and its file up to date. KeyboardInterrupt and Preempted pass
    through."""
    make_run_folder(job.folder)
    if outcome.state != TRAINED:
        outcome.state, outcome.reason, outcome.made_with = RUNNING, None, job.made_with
        if not _can_be_answered(job, outcome, title):
            return
        outcome.made_with = {**job.made_with, DATA: identities(job.config, job.splits)}
        if job.untuned:
            if not _is_written(job, outcome, title):
                return
        elif not _run_program("train", plan.train, job.train_words, plan.ranks, job, outcome, title):
            return
        outcome.state = TRAINED
    if not _run_program("evaluate", plan.evaluate, job.evaluate_words, plan.ranks, job, outcome, title):
        return
    facts = _read(job.folder / "run.json")
    parameters, outcome.full_qformer = facts["parameters"].values(), facts.get("full_qformer")
    outcome.parameters, outcome.trained = (sum(part[name] for part in parameters) for name in ("total", "trainable"))
    places = {name: answers_folder(job.folder, name, split) for name, split in job.splits.items()}
    outcome.metrics = row_metrics({name: _read(place / "metrics.json") for name, place in places.items()})
    outcome.steps, outcome.state = outcome.metrics["step"], DONE
    write_outcome(job.folder, outcome)


def _can_be_answered(job: Job, outcome: Outcome, title: str) -> bool:
    """Whether the split that the row will answer is there and fits its scorer, asked before hours of training; if not,
    `outcome` says why."""

    def look() -> None:
        for name, one in each_set(job.config).items():
            if name in job.splits:
                with of_set(name):
                    samples = ensure_samples(one, job.splits[name], rebuild=job.rebuild)
                    answerable_samples(samples, one, job.max_samples)

    return _succeeds(look, job, outcome, title)


def _is_written(job: Job, outcome: Outcome, title: str) -> bool:
    """Whether the folder of a row that is not trained could be made; if not, `outcome` says why."""
    logger.info("%s: answers as it is before tuning", title)
    return _succeeds(lambda: write_untuned_run(job.folder, job.config), job, outcome, title)


def _succeeds(step: Callable[[], None], job: Job, outcome: Outcome, title: str) -> bool:
    try:
        step()
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
