"""launch/submit.py: from a recipe to a job of Slurm, with everything checked that can be on the login node.

    python launch/submit.py --recipe RECIPE --ds ds_configs/zero2.json --nodes 2 --gpus-per-node 8 --time 24:00:00
        [--account A] [--partition P] [--gpu-memory 80] [--dry-run] [--KEY VALUE ...]

settings -> DeepSpeed's JSON -> memory plan -> RUN/frozen (recipe, JSON, code, the filled sbatch file) -> sbatch

The job runs the frozen code and recipe, however the checkout changes while it waits or is requeued. The interpreter,
its packages, the data and the run's folder are not copied: all nodes have to see them by the same paths, and relative
ones mean this folder.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import data_prep
from vltrain.config.command_line import COMMAND_LINE, Option, Settings, whole_number
from vltrain.config.recipe import dump_config
from vltrain.config.stages import Run, dump_run, load_stages, refuse_untuned
from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.programs.plan import OPTIONS as PLAN_OPTIONS
from vltrain.programs.plan import plan_recipe
from vltrain.shipped import DS_CONFIGS, LAUNCH, PACKAGE
from vltrain.train.run.provenance import code_commit, make_run_folder
from vltrain.train.zero.ds_config import load_ds_json

TEMPLATE = LAUNCH / "slurm" / "train_mmt.sbatch"
MARK = "#@ launch/submit.py puts its options here\n"
SBATCH_SECONDS = 300.0
FROZEN = "frozen"
CODE = {"vltrain": PACKAGE, "data_prep": Path(data_prep.__file__).parent, "launch": LAUNCH, "ds_configs": DS_CONFIGS}
TIME = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}"
EXAMPLES = (
    "vltrain submit --recipe llama2_7b_diht_scienceqa --ds zero2 --nodes 2 --gpus-per-node 8 --time 24:00:00 "
    "--account A",
    "vltrain submit --recipe quickstart --gpus-per-node 0 --ranks-per-node 2 --dry-run",
)
OPTIONS: dict[str, Option] = {
    "ds": Option("DeepSpeed's memory and communication settings; left out: ZeRO-2", metavar="JSON"),
    "nodes": Option("how many nodes", "1", "N"),
    "gpus-per-node": Option("GPUs of a node, and ranks on it; 0: ranks on CPUs", "1", "N"),
    "ranks-per-node": Option("ranks of a node without GPUs", metavar="N"),
    "time": Option("Slurm's time limit of one start, such as 24:00:00; left out: the partition's", metavar="TIME"),
    "account": Option("account to charge", metavar="NAME"),
    "partition": Option("where it runs", metavar="NAME"),
    "sbatch": Option("further options of sbatch, in one word: '--constraint=a100 --exclusive'", metavar="OPTIONS"),
    "gpu-memory": Option("GiB of one GPU; a recipe that does not fit is refused", metavar="GIB"),
}


@exits_cleanly
def main(argv: list[str], *, program: str = "launch/submit.py") -> int:
    """Submits what the command line describes; with --dry-run only prints the sbatch file. Returns 0, or 2 for a
    mistake in the input."""
    is_dry = "--dry-run" in argv
    argv = [word for word in argv if word != "--dry-run"]
    description = (
        "Checks a recipe and its memory plan, and submits it to Slurm; with --dry-run prints the sbatch file only."
    )
    whole = load_stages(argv, program=program, description=description, options=OPTIONS, examples=EXAMPLES)
    settings = whole.parts[0]
    if settings.recipe is None:
        raise InputError(f"{COMMAND_LINE}: found no --recipe, expected a file such as launch/recipes/quickstart.yaml")
    refuse_untuned(whole)
    run = whole.folder.resolve()
    text = fill(TEMPLATE.read_text(), settings, run)
    plan = [check_plan(part) for part in whole.parts][-1]
    if is_dry:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch: not found; run this on a login node of a Slurm cluster, or look at the file with --dry-run"
        )
    freeze(run, whole, text)
    job = submit(run)
    print(f"job {job}: {plan}\nits log: {run}/logs/slurm-{job}.log, and a file for each rank beside it")
    if "tensorboard" in settings.config.train.loggers:
        print(f"tensorboard --logdir {run}/tensorboard")
    return 0


def ranks_of(settings: Settings) -> tuple[int, int, int]:
    """(nodes, GPUs per node, ranks per node). Raises InputError for what is no number or contradicts itself."""
    nodes, gpus = _number(settings, "nodes", 1), _number(settings, "gpus-per-node", 0)
    if settings.options["ranks-per-node"] is None:
        if gpus == 0:
            raise InputError(f"{COMMAND_LINE}: --gpus-per-node 0 needs --ranks-per-node")
        return nodes, gpus, gpus
    ranks = _number(settings, "ranks-per-node", 1)
    if gpus not in (0, ranks):
        raise InputError(
            f"{COMMAND_LINE}: --ranks-per-node {ranks} on {gpus} GPU(s), but a rank has one GPU; leave it out, "
            "or say --gpus-per-node 0"
        )
    return nodes, gpus, ranks


def _number(settings: Settings, name: str, least: int) -> int:
    return whole_number(name, settings.options[name] or "", least)


def check_plan(settings: Settings) -> str:
    """Plans the memory of a rank, in a line. Raises InputError if it contradicts the recipe, or does not fit into
    --gpu-memory."""
    nodes, gpus, ranks = ranks_of(settings)
    defaults = {name: option.default for name, option in PLAN_OPTIONS.items()}
    plan = plan_recipe(replace(settings, options={**defaults, **settings.options, "gpus": str(nodes * ranks)}))
    peak = plan["memory_per_rank"]["peak_gib"]
    memory = settings.options["gpu-memory"]
    for card, found in plan["cards"].items():
        if memory is not None and found["verdict"] == "too small":
            raise InputError(
                f"{settings.recipe}: needs {peak:.1f} GiB on each of {nodes * ranks} ranks, more than {card}; "
                "take more ranks or another --ds "
                f"(`vltrain plan` shows what takes it), or train.activation_checkpointing"
            )
    return (
        f"{nodes * ranks} rank(s) on {nodes} node(s), ZeRO stage {plan['zero_stage']}, planned peak {peak:.2f} GiB "
        "on each"
    )


def fill(template: str, settings: Settings, run: Path) -> str:
    """The sbatch file of a run: the template with this job's options, and with what its script needs to know."""
    assert template.count(MARK) == 1, TEMPLATE
    nodes, gpus, ranks = ranks_of(settings)
    options = settings.options
    if options["time"] is not None and not re.fullmatch(TIME, options["time"]):
        raise InputError(
            f"{COMMAND_LINE}: --time: found '{options['time']}', expected Slurm's notation: minutes, H:MM:SS, "
            "D-H or D-HH:MM:SS"
        )
    words = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}"]
    words += [f"--gpus-per-node={gpus}"] if gpus else []
    words += [f"--{name}={options[name]}" for name in ("time", "account", "partition") if options[name] is not None]
    words += [f"--chdir={Path.cwd()}", f"--output={run}/logs/slurm-%j.log"]
    try:
        words += shlex.split(options["sbatch"] or "")
    except ValueError as error:
        raise InputError(
            f"{COMMAND_LINE}: --sbatch: found {options['sbatch']!r}, expected options of sbatch ({error})"
        ) from None
    for word in words:
        if "\n" in word:
            raise InputError(f"{COMMAND_LINE}: found a line break in '{word}', expected one line")
    lines = [f"#SBATCH {shlex.quote(word)}\n" for word in words]
    return template.replace(
        MARK, "".join(lines) + f"set -- {shlex.quote(str(run))}\nPYTHON={shlex.quote(sys.executable)}\n"
    )


def freeze(run: Path, whole: Run, sbatch: str) -> Path:
    """Writes RUN/frozen, which the job runs from. Raises InputError if it is there already, or cannot be written."""
    frozen = run / FROZEN
    if frozen.exists():
        raise InputError(
            f"{frozen}: was submitted before; resume it by sbatch {frozen / TEMPLATE.name}, or choose another --output"
        )
    make_run_folder(run)
    (run / "logs").mkdir(exist_ok=True)
    ds_json = load_ds_json(whole.parts[0].options["ds"])
    with new_folder(frozen) as folder:
        for name, place in CODE.items():
            shutil.copytree(place, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "code" / "COMMIT").write_text(code_commit() + "\n")
        (folder / "recipe.yaml").write_text(_frozen_recipe(run, whole))
        (folder / "ds.json").write_text(json.dumps(ds_json, indent=2) + "\n")
        (folder / TEMPLATE.name).write_text(sbatch)
    return frozen


def _frozen_recipe(run: Path, whole: Run) -> str:
    """The whole resolved recipe, whose output is the absolute path of the run's folder."""
    if whole.names:
        return dump_run(replace(whole, folder=run))
    return dump_config(replace(whole.parts[0].config, output=str(run)))


def submit(run: Path) -> str:
    """Hands the frozen file to sbatch. Returns the job's id; raises InputError with sbatch's own words, after taking
    RUN/frozen away again."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(run / FROZEN / TEMPLATE.name)],
            capture_output=True,
            text=True,
            timeout=SBATCH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        frozen = run / FROZEN
        raise InputError(
            f"sbatch gave no answer within {SBATCH_SECONDS:.0f} s: see by squeue whether the job is there; if "
            f"not, remove {frozen} and submit again"
        ) from None
    if done.returncode:
        shutil.rmtree(run / FROZEN)
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"sbatch refused the job: {said}; nothing was submitted")
    return done.stdout.strip().partition(";")[0]
