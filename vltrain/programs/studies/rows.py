"""The runs that a table asks for: each row's, with each of the seeds; and what is on the disk of them already."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vltrain.config.command_line import COMMAND_LINE, REBUILD, Arguments, Option, load_settings
from vltrain.config.keys import keys_of
from vltrain.config.mixture import each_set
from vltrain.config.older_runs import ADDED, value_before
from vltrain.config.ranges import MOST_SEED
from vltrain.config.recipe import read_table
from vltrain.config.schema import Config
from vltrain.config.stages import value_of
from vltrain.config.tables import Table
from vltrain.errors import InputError, nearest
from vltrain.evaluate.ready import require_scorer
from vltrain.inference.run import recorded_identity
from vltrain.launching.launcher import default_ranks, find_program
from vltrain.memory.sizes import SAYS_SIZES, is_here
from vltrain.prepared.origins import samples_folder
from vltrain.programs import plan as one_recipe
from vltrain.programs.studies.planned import PASSED_ON
from vltrain.programs.studies.sets import answered_splits, identities
from vltrain.programs.studies.table import DONE, OUTCOME, TRAINED, Outcome, read_outcome, seed_folder, seed_of
from vltrain.shipped import find_recipe
from vltrain.train.run.identity import MADE_OF, differences
from vltrain.train.run.made_of import made_of
from vltrain.train.zero.ds_config import load_ds_json, resolve_ds_config

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Option] = {
    "ds": Option("DeepSpeed's knobs", metavar="JSON"),
    "only": Option("rows", metavar="ROW ..."),
    "seeds": Option("runs of each row, each with a seed of its own", metavar="N"),
    "against": Option("row that the others are tested against", metavar="ROW"),
    "plan": Option("plan the rows, and run nothing", metavar=None),
    **{name: one_recipe.OPTIONS[name] for name in PASSED_ON},
    "ranks": Option("ranks", metavar="N"),
    "split": Option("split to answer", metavar="NAME"),
    REBUILD: Option("make data that does not match anew", metavar=None),
}
BEST = "best"  # in the place of a row to test against
# What is drawn: order of packs and dropout; weights that begin at random; of a share of the samples, which they are.
SEEDS = ("train.seed", "model.seed", "data.fraction_seed")
MOST_SEEDS = 100
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
    "eval.spread",
    "eval.tensorboard_samples",
}
DATA = "samples"  # in what a row was made with: their digest, known once they are there
UNTUNED = "ablation.untuned"  # there, too
# These too, unless the best checkpoint is answered by, or evaluations end the training.
CHANGE_SELECTION = {"data.eval_split", "train.eval_every_steps", "train.eval_every_epochs"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a row: its folder, the words of its two programs, the settings that make its figures what they are, and
    the split that it answers (by set; without a mixture under no name), with at most `max_samples` questions. `seed`:
    None where each row is run once; `untuned`: nothing is trained."""

    row: str
    seed: int | None
    folder: Path
    train_words: tuple[str, ...]
    evaluate_words: tuple[str, ...]
    splits: dict[str, str]
    made_with: dict[str, Any]
    config: Config
    max_samples: int | None
    rebuild: bool
    untuned: bool

    @property
    def name(self) -> str:
        """It in words."""
        return self.row if self.seed is None else f"{self.row}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command line asks for. `jobs`: all runs of the table, seed by seed; `chosen`: the rows to run; `against`:
    the row that others are tested against, or `best`; `overrides`: settings of the command line; `planning`: words for
    `vltrain plan`, where rows are planned and not run."""

    table: Table
    folder: Path
    jobs: tuple[Job, ...]
    chosen: tuple[str, ...]
    ranks: int
    train: Path
    evaluate: Path
    against: str
    overrides: tuple[str, ...]
    planning: tuple[str, ...] | None

    @property
    def split(self) -> str:
        """The split that files of answers answer."""
        return next(iter(self.jobs[0].splits.values()))


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
    count = _number_of_seeds(arguments.last("seeds"))
    rows = [_jobs(arguments, table, row, folder, ranks, count) for row in table.rows]
    jobs = tuple(job for jobs in zip(*rows) for job in jobs)
    _require_these_seeds(folder, table, [job.seed for job in rows[0] if job.seed is not None])
    programs = {
        "train": find_program(table.ablation.program, f"{table.path}: ablation.program"),
        "evaluate": find_program(table.ablation.evaluate, f"{table.path}: ablation.evaluate"),
    }
    against = _against(arguments.last("against"), table)
    return Plan(
        table=table,
        folder=folder,
        jobs=jobs,
        chosen=chosen,
        ranks=ranks,
        against=against,
        overrides=_overrides(arguments),
        planning=_planning(arguments),
        **programs,
    )


def _overrides(arguments: Arguments) -> tuple[str, ...]:
    return tuple(f"--{name}={value}" for name, value in arguments.options if name not in OPTIONS and name != "output")


def _planning(arguments: Arguments) -> tuple[str, ...] | None:
    words = tuple(f"--{name}={value}" for name, value in arguments.options if name in PASSED_ON)
    if ("plan", None) in arguments.options:
        ds = arguments.last("ds")
        return (*words, *((f"--ds={ds}",) if ds else ()))
    if words:
        raise InputError(f"{COMMAND_LINE}: {words[0].partition('=')[0]}: has no effect without --plan; leave it out")
    return None


def _chosen_rows(arguments: Arguments, table: Table) -> tuple[str, ...]:
    named = [value for option, value in arguments.options if option == "only" and value is not None]
    others = arguments.positionals[1:]  # --only a b: the parser gives `only` one word and leaves the others standing
    if others and not named:
        raise InputError(f"{COMMAND_LINE}: found '{others[0]}' behind the table, expected --only {' '.join(others)}")
    for row in (*named, *others):
        if row not in table.lines:
            raise InputError(f"{COMMAND_LINE}: --only: no row '{row}' in {table.path}, {nearest(row, table.lines)}")
    return tuple(row for row in table.lines if not named or row in named or row in others)


def _number_of_ranks(text: str | None) -> int:
    if text is None:
        return default_ranks()
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise InputError(f"{COMMAND_LINE}: --ranks: found {text!r}, expected a number of 1 or more")
    return int(text)


def _number_of_seeds(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 2 <= int(text) <= MOST_SEEDS):
        told = "; one seed has no spread to test by: leave the option out" if text == "1" else ""
        raise InputError(f"{COMMAND_LINE}: --seeds: found {text!r}, expected a number from 2 to {MOST_SEEDS}{told}")
    return int(text)


def _against(named: str | None, table: Table) -> str:
    where, row = f"{COMMAND_LINE}: --against", named
    if row is None:
        where, row = f"{table.path}: ablation.against", table.ablation.against or next(iter(table.rows))
    if row not in table.lines and row != BEST:
        raise InputError(f"{where}: no row '{row}' in {table.path}, {nearest(row, [*table.lines, BEST])}")
    return row


def _require_these_seeds(folder: Path, table: Table, seeds: Sequence[int]) -> None:
    """Raises InputError if runs of other seeds are there, or of none: which seeds a table shows is said beforehand, not
    chosen by what came of them."""
    for row in table.rows:
        found = sorted(seed for path in (folder / row).glob("*") if (seed := seed_of(path)) is not None)
        told = f"{folder / row}: holds runs of the seeds {', '.join(map(str, found))}"
        again = "choose another --output, or remove it"
        if found and not seeds:
            raise InputError(f"{told}, and no --seeds is said: say --seeds {len(found)} as it was, {again}")
        if set(found) - set(seeds):
            raise InputError(f"{told}, expected no others than {', '.join(map(str, seeds))}: begin as before, {again}")
        if seeds and (folder / row / OUTCOME).exists():
            raise InputError(f"{folder / row}: holds a run of row '{row}' that was begun without --seeds; {again}")


def _jobs(arguments: Arguments, table: Table, row: str, folder: Path, ranks: int, count: int | None) -> list[Job]:
    """The runs of a row: one, or one for each of `count` seeds, from the recipe's own on."""
    drawn = () if count is None else SEEDS
    overrides = _overrides(arguments)
    for key in drawn:
        if key in table.rows[row]:
            found = f"row '{row}' of {table.path} sets {key} itself"
            raise InputError(f"{COMMAND_LINE}: --seeds: {found}; leave one of both out")
    recipe = ("--recipe", str(table.recipe_of(row)), "--output", str(folder / row))
    try:
        config = load_settings([*recipe, *overrides], program="vltrain ablate", options=OPTIONS).config
        scored = [one for name, one in each_set(config).items() if name in answered_splits(config, None)]
        for one in scored or [config]:
            require_scorer(one)
    except InputError as error:
        raise InputError(f"{error} (row '{row}' of {table.path})") from None
    ds = arguments.last("ds")
    resolve_ds_config(load_ds_json(ds), config, ranks)
    overrides = tuple(word for word in overrides if not word.startswith(tuple(f"--{key}=" for key in drawn)))
    if count is None:
        return [_job(arguments, table, row, None, folder / row, config, overrides)]
    seeds = {key: value_of(config, key) for key in SEEDS if key != "data.fraction_seed" or config.data.fraction < 1}
    if max(seeds.values()) + count > MOST_SEED:
        raise InputError(f"{COMMAND_LINE}: --seeds: {count} from the recipe's on are above the largest, {MOST_SEED}")
    jobs: list[Job] = []
    for number in range(count):
        own = {key: seed + number for key, seed in seeds.items()}
        drawn = replace(config.data, fraction_seed=own.get("data.fraction_seed", config.data.fraction_seed))
        train, model = replace(config.train, seed=own["train.seed"]), replace(config.model, seed=own["model.seed"])
        seeded = replace(config, train=train, model=model, data=drawn)
        words = (*overrides, *(f"--{key}={seed}" for key, seed in own.items()))
        jobs.append(_job(arguments, table, row, train.seed, folder / row / seed_folder(train.seed), seeded, words))
    return jobs


def _job(
    arguments: Arguments,
    table: Table,
    row: str,
    seed: int | None,
    folder: Path,
    config: Config,
    overrides: tuple[str, ...],
) -> Job:
    ds = arguments.last("ds")
    recipe = ("--recipe", str(table.recipe_of(row)), "--output", str(folder))
    said = arguments.last("split") or table.ablation.split
    splits = answered_splits(config, said)
    split = splits.get("", said)
    bounded = arguments.last("eval.max_samples") is not None
    max_samples = config.eval.max_samples if bounded else table.ablation.max_samples
    bound = () if max_samples is None else ("--eval.max_samples", str(max_samples))
    untuned = row in table.ablation.untuned
    chosen = "none" if untuned else "best" if config.train.keep_best else None
    checkpoint = () if chosen is None else ("--checkpoint", chosen)
    rebuild = (REBUILD, None) in arguments.options
    asked: dict[str, Any] = {} if max_samples is None else {"eval.spread": config.eval.spread}
    return Job(
        row=row,
        seed=seed,
        folder=folder,
        train_words=(*recipe, *overrides, *(("--ds", ds) if ds else ()), *(("--rebuild",) if rebuild else ())),
        evaluate_words=(str(folder), *(("--split", split) if split else ()), *checkpoint, *bound),
        splits=splits,
        made_with={**_figures(config), **asked, "split": split, "questions": max_samples, UNTUNED: untuned or None},
        config=config,
        max_samples=max_samples,
        rebuild=rebuild,
        untuned=untuned,
    )


def _figures(config: Config) -> dict[str, Any]:
    """The settings by dotted name, as they come back from JSON, that a row's figures depend on."""
    values: dict[str, Any] = {}
    selects = config.train.keep_best or config.train.early_stopping_patience is not None
    for key in keys_of(config.model.architecture).keys() - CHANGE_NOTHING - (set() if selects else CHANGE_SELECTION):
        values[key] = value_of(config, key)
    return json.loads(json.dumps(values))


def absent_weights(config: Config) -> list[str]:
    """Sources of weights that the recipe names and that are not on this machine."""
    sources = [value_of(config, f"model.{key}") for key in config.model.PATHS if key.endswith("source")]
    return [source for source in sources if source is not None and not _is_here(source)]


def _is_here(source: str) -> bool:
    """Whether weights can be read without fetching anything. The hub is not asked: a row that is run asks it."""
    if "://" in source or Path(source).expanduser().exists():
        return is_here(source)
    with suppress(HFValidationError):  # no hub name
        return any(isinstance(try_to_load_from_cache(source, name), str) for name in SAYS_SIZES)
    return False


def settled(job: Job) -> Outcome:
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
                f"{job.folder}: holds row '{job.name}' of other settings: {found}; {again}choose another "
                "--output, or remove it"
            )
    _require_same_files(job)
    data = identities(job.config, job.splits)
    if data is not None and outcome.made_with.get(DATA, data) != data:
        where = " or ".join(str(samples_folder(one)) for one in each_set(job.config).values())
        found = f"{where} has other samples now than it was trained and answered on"
        raise InputError(
            f"{job.folder}: holds row '{job.name}' of other data: {found}; choose another --output, or remove it"
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
        logger.warning("row %s: cannot check whether its weights have changed (%s)", job.name, error)
        return
    changed = list(differences({MADE_OF: identity[MADE_OF]}, {MADE_OF: files}))
    if changed:
        raise InputError(
            f"{job.folder}: holds row '{job.name}' over other weights: {'; '.join(changed)}; choose another "
            "--output, or remove it"
        )
