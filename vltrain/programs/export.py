"""`vltrain export RUN --output FOLDER [--format NAME] [--checkpoint best|none|FOLDER] [--dtype fp32|bf16|fp16] [--engine NAME]`

A trained model for others to load. The folder must be new; it appears when it is whole; vltrain_origin.json in it says which weights it was made of.

    --format      one of its architecture's, see below
    --checkpoint  a checkpoint's folder, or best; left out: the run's newest; none (where nothing tuned is needed): the model before tuning, the base
                  of a run that began with random weights
    --dtype       of the weights that are written, where a format writes the whole model: fp32 (default), bf16 or fp16
    --engine      the engine that is to load the folder, where a format depends on that: what it cannot take is refused

Exit code: 0, or 2 for a mistake in the input.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from vltrain.data.folder import new_folder
from vltrain.data.tokenizer_sources import tokenizer_sources
from vltrain.errors import InputError, exits_cleanly
from vltrain.export.format import DTYPES, Choices, Source, Written
from vltrain.export.table import describe_formats, find_format
from vltrain.files.whole import write_json
from vltrain.inference.run import choose_checkpoint, recipe_of, weights_before, weights_used
from vltrain.programs.run_folder import read_command
from vltrain.settings import COMMAND_LINE
from vltrain.train.made_of import made_of

ORIGIN = "vltrain_origin.json"  # in an exported folder: which weights it was made of
CHOICES = ("dtype", "engine")


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain export") -> int:
    """Exports what the command line names. Returns the exit code."""
    help_text = f"{__doc__}\nFormats:\n{describe_formats()}"
    told = read_command(argv, program=program, help_text=help_text, options=("format", "checkpoint", *CHOICES))
    if told is None:
        return 0
    run, output, arguments = told
    given = {name: value for name in CHOICES if (value := arguments.last(name)) is not None}
    export(run, output, arguments.last("format"), arguments.last("checkpoint"), given)
    return 0


def export(run: Path, output: Path, form: str | None = None, named: str | None = None, given: dict[str, str] | None = None) -> None:
    """Writes the checkpoint `named` (see `choose_checkpoint`) of the run in the folder `run` into the new folder `output`, see the module.

    Args:
        form: a name of `FORMATS`; None: the default of the run's architecture.
        given: options that the command line sets, of `CHOICES`.

    Raises: InputError for a run that is none, a format that its architecture lacks, and for what the format cannot hold.
    """
    config = recipe_of(run)
    name, chosen = find_format(config.model.architecture, form, f"{COMMAND_LINE}: --format")
    choices = _choices(given or {}, name, chosen.options)
    chosen.refuse(Source(run=run, config=config, checkpoint=None, tokenizer=tokenizer_sources(config)), choices)
    checkpoint = choose_checkpoint(run, named)
    if checkpoint is None and chosen.needs_tuned:
        raise InputError(f"{COMMAND_LINE}: --checkpoint none: there is nothing tuned to export as {name}")
    facts = weights_used(run, config, checkpoint, made_of(config) if chosen.reads_base else None)
    before = weights_before(run, config) if checkpoint is None else None
    source = Source(run=run, config=config, checkpoint=checkpoint, before=before, tokenizer=tokenizer_sources(config), facts=facts)
    with new_folder(output) as folder:
        try:
            told = chosen.write(folder, source, choices) or Written()
            write_json(folder / ORIGIN, {"run": str(run), "format": name, **facts, **told.facts, **({"notes": told.notes} if told.notes else {})})
        except SafetensorError as error:  # a full disk, among others
            raise InputError(f"{output}: could not be written ({error}); nothing was left there") from None
    print(f"{output}: {name} folder of {checkpoint.path if checkpoint is not None else 'the untuned model'}")
    for note in told.notes:
        print(note)


def _choices(given: dict[str, str], name: str, options: frozenset[str]) -> Choices:
    """Raises InputError for an option that the format does not read, and for an unknown dtype."""
    for option in given:
        if option not in options:
            raise InputError(f"{COMMAND_LINE}: --{option}: has no effect on the format {name}; leave it out")
    if given.get("dtype", "fp32") not in DTYPES:
        raise InputError(f"{COMMAND_LINE}: --dtype: found '{given['dtype']}', expected one of {', '.join(DTYPES)}")
    return Choices(**given)
