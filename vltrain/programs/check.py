"""`vltrain check`: what can be proven about a run, before it and after it, and about its data.

    vltrain check recipe RECIPE --ds JSON [--ranks N] [--KEY VALUE ...]

tries what a run of the recipe would be, on its own packs, model, kernels and ranks: the packs that are likeliest to
fail go through forward, backward and step, every gradient arrives where it should, frozen weights stay; then it ends
without training. `train.check` has a part of this done at the beginning of each run. Exit code 0: proven; 1: something
fails, a line each; 2: a mistake in the input.

    vltrain check resume RUN [OTHER] [--packs FOLDER] [--tolerance 1e-5]

proves from the run's receipt that every step was done once and in order, that every sample was seen once a pass, that
no frozen weight moved, that the samples' losses in the history add up to each step's, and that the newest checkpoint,
read whole, is where the receipt says (one that was cut short, or put back, fails); and that
OTHER, a run that was interrupted or not, on as many ranks or others, had the same samples in the same steps and the
same losses (bit for bit, or to a relative tolerance). Exit code 0: proven; 1: something differs, and it says what
first; 2: a mistake in the input, such as a folder without a receipt. Of a run in stages, here and with `weights`, each
stage is checked.

    vltrain check weights RUN [--KEY VALUE ...]

reads every file of the run's checkpoints, of its frozen weights and of its tokenizer anew, and compares each digest
with the one that the run keeps. A folder that has moved is named by its new path (--model.llm.source FOLDER). Exit code
as above.

    vltrain check data FOLDER

reads every file of prepared samples and packs (a data.root, or a folder of one of them) anew, and the raw data where it
still is, and compares each digest with the one kept beside them; a run's start trusts size, times and inode. Exit code
as above.

    vltrain check export FOLDER [--run RUN] [--proof-samples N]

proves a folder of `vltrain export` anew: a clean process reads it by stock libraries alone, and what it says is
compared with the run that the folder was made of (--run where that has moved). Exit code as above.

    vltrain check replay RUN --step K [--packs FOLDER]

does a step of the run once more, in one process, from the newest checkpoint before it, and shows the loss of each of
its samples, those that are NaN or Inf first. Exit code 0, or 1 where there are such; the run's folder is left as it is.
See `vltrain.programs.checks.replay`.

examples:
    vltrain check recipe quickstart --ds zero2 --ranks 2
    vltrain check resume runs/quickstart
    vltrain check resume runs/quickstart runs/again --tolerance 1e-5
    vltrain check weights runs/quickstart
    vltrain check data data/easyvqa
    vltrain check replay runs/quickstart --step 57
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE, Arguments, split_arguments
from vltrain.config.stages import stage_folders
from vltrain.console import start_logging
from vltrain.data.remote.address import place_of
from vltrain.errors import InputError, exits_cleanly, nearest
from vltrain.receipts.verify import Proof, prove

EXIT_DIFFERS = 1
RECIPE = "recipe"
"""The check that reads its words as `vltrain train` does."""


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain check") -> int:
    """Runs the check that the first word names. Returns the exit code, see the module."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0
    if argv[0] not in (*CHECKS, RECIPE):
        raise InputError(f"{COMMAND_LINE}: unknown check '{argv[0]}', {nearest(argv[0], (*CHECKS, RECIPE))}")
    if argv[0] == RECIPE:
        from vltrain.programs.checks.recipe import check_recipe

        return check_recipe(argv[1:])
    arguments = split_arguments(argv[1:])
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    return CHECKS[argv[0]](arguments)


def _resume(arguments: Arguments) -> int:
    _require_known(arguments, ("packs", "tolerance"))
    if not 1 <= len(arguments.positionals) <= 2:
        raise InputError(f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected RUN, or RUN OTHER")
    run, *other = map(Path, arguments.positionals)
    packs = arguments.last("packs")
    tolerance = _tolerance(arguments.last("tolerance") or "0")
    stages, others = stage_folders(run), stage_folders(other[0]) if other else []
    if other and [stage.name for stage in stages] != [stage.name for stage in others]:
        raise InputError(
            f"{COMMAND_LINE}: {run} and {other[0]} have not the same stages; compare the folders of single stages"
        )
    if stages and packs is not None:
        raise InputError(
            f"{COMMAND_LINE}: --packs: each stage of {run} may have its own; check a stage's folder, such as "
            f"{stages[0]}"
        )
    pairs = zip(stages, others or [None] * len(stages), strict=True) if stages else [(run, other[0] if other else None)]
    return max(
        _show(prove(one, place_of(packs) if packs else None, another, tolerance), one.name if stages else "")
        for one, another in pairs
    )


def _show(proof: Proof, stage: str = "") -> int:
    title = f"{stage}: " if stage else ""
    for fact in proof.facts:
        print(f"ok      {title}{fact}")
    for failure in proof.failures:
        print(f"FAILED  {title}{failure}")
    return EXIT_DIFFERS if proof.failures else 0


def _weights(arguments: Arguments) -> int:
    from vltrain.programs.checks.weights import check_weights

    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected RUN")
    start_logging()
    run, words = Path(arguments.positionals[0]), [f"--{name}={value}" for name, value in arguments.options]
    stages = stage_folders(run)
    return max(_show(check_weights(one, words), one.name if stages else "") for one in stages or [run])


def _data(arguments: Arguments) -> int:
    from vltrain.programs.checks.data import check_data

    _require_known(arguments, ())
    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected FOLDER")
    start_logging()
    return _show(check_data(place_of(arguments.positionals[0])))


def _export(arguments: Arguments) -> int:
    from vltrain.programs.checks.export import check_export

    _require_known(arguments, ("run", "proof-samples"))
    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected FOLDER")
    start_logging()
    run = arguments.last("run")
    return _show(check_export(Path(arguments.positionals[0]), Path(run) if run else None, arguments))


def _replay(arguments: Arguments) -> int:
    from vltrain.programs.checks.replay import replay  # with torch and DeepSpeed, which a proof does without

    _require_known(arguments, ("step", "packs"))
    step, packs = arguments.last("step"), arguments.last("packs")
    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected RUN")
    if step is None or not step.isdecimal():
        raise InputError(
            f"{COMMAND_LINE}: --step: found {step or 'nothing'}, expected the number of a step, counted from 0"
        )
    start_logging()
    if stages := stage_folders(Path(arguments.positionals[0])):
        raise InputError(
            f"{arguments.positionals[0]}: a run in stages, expected one of them: {', '.join(map(str, stages))}"
        )
    losses = replay(Path(arguments.positionals[0]), int(step), place_of(packs) if packs else None)
    print("        loss  label tokens  sample")
    for name, loss, count in losses:
        print(f"{loss:12.6g}  {count:12d}  {name}")
    num_bad = sum(not math.isfinite(loss) for _, loss, _ in losses)
    print(f"step {step}: {len(losses)} samples, {num_bad} with a loss that is NaN or Inf")
    return EXIT_DIFFERS if num_bad else 0


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"{COMMAND_LINE}: --tolerance: found {text!r}, expected a relative difference such as 1e-5")
    return value


def _require_known(arguments: Arguments, known: tuple[str, ...]) -> None:
    for name, _ in arguments.options:
        if name not in known:
            raise InputError(f"{COMMAND_LINE}: unknown option '--{name}', {nearest(name, known)}")


CHECKS: dict[str, Callable[[Arguments], int]] = {
    "resume": _resume,
    "weights": _weights,
    "data": _data,
    "export": _export,
    "replay": _replay,
}
