"""`vltrain export RUN --output FOLDER [--format NAME] [--checkpoint best|none|FOLDER] [--dtype fp32|bf16|fp16]
[--engine NAME]`

    vltrain export runs/quickstart --output exported
    vltrain export runs/quickstart --output exported --format adapters --checkpoint best

A trained model for others to load. The folder must be new; it appears when it is whole, and when a clean process has
read it by stock libraries alone and computed with it what the run's own model computes of real samples: proof.json in
it says how near. vltrain_origin.json says which weights it was made of, README.md how it is loaded.

    --format         one of its architecture's, see below
    --checkpoint     a checkpoint's folder, or best; left out: the run's newest; none (where nothing tuned is needed):
                     the model before tuning, the base of a run that began with random weights
    --dtype          of the weights that are written, where a format writes the whole model: fp32 (default), bf16 or
                     fp16
    --engine         the engine that is to load the folder, where a format depends on that: what it cannot take is
                     refused
    --proof-samples  how many samples of the run's evaluation data the proof asks (8)
    --proof none     export without a proof, where the samples are not there: proof.json then says so

Exit code: 0, or 2 for a mistake in the input and for an export that fails its proof, of which nothing is left.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vltrain.config.command_line import COMMAND_LINE, Arguments
from vltrain.config.mixture import each_set
from vltrain.config.schema import Config
from vltrain.data.folder import new_folder
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.errors import InputError, exits_cleanly
from vltrain.export.card import write_card
from vltrain.export.format import DTYPES, Choices, Format, Source, Written
from vltrain.export.proof import ProofFailed, prove, write_unproven
from vltrain.export.reference import ProofData, proof_data
from vltrain.export.table import describe_formats, find_format
from vltrain.files.atomic import write_json
from vltrain.inference.run import choose_checkpoint, how_run_was_asked, recipe_of, weights_before, weights_used
from vltrain.launching.run_folder import read_command
from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.prepared.origins import samples_file
from vltrain.train.checkpoints.checkpoint import Checkpoint
from vltrain.train.run.lora_folder import EXPORTED as ORIGIN
from vltrain.train.run.made_of import made_of

logger = logging.getLogger(__name__)

CHOICES = ("dtype", "engine")
PROOF_SAMPLES = 8


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain export") -> int:
    """Exports what the command line names. Returns the exit code."""
    help_text = f"{__doc__}\nFormats:\n{describe_formats()}"
    told = read_command(
        argv,
        program=program,
        help_text=help_text,
        options=("format", "checkpoint", *CHOICES, "proof-samples", "proof"),
        can_be_quiet=True,
    )
    if told is None:
        return 0
    run, output, arguments = told
    given = {name: value for name in CHOICES if (value := arguments.last(name)) is not None}
    export(
        run,
        output,
        arguments.last("format"),
        arguments.last("checkpoint"),
        given,
        proof_samples=proof_samples_of(arguments),
    )
    return 0


def export(
    run: Path, output: Path, form: str | None = None, named: str | None = None, given: dict[str, str] | None = None, *,
    proof_samples: int | None = PROOF_SAMPLES,
) -> None:  # fmt: skip
    """Writes the checkpoint `named` (see `choose_checkpoint`) of the run in the folder `run` into the new folder
    `output`, see the module.

    Args:
        form: a name of `FORMATS`; None: the default of the run's architecture.
        given: options that the command line sets, of `CHOICES`.
        proof_samples: how many samples the folder is tried with; None: none, it is left unproven.

    Raises: InputError for a run that is none, a format that its architecture lacks, what the format cannot hold,
    samples that are not there, and a
        folder that does not compute what the run does.
    """
    config = recipe_of(run)
    name, chosen = find_format(config.model.architecture, form, f"{COMMAND_LINE}: --format")
    choices = _choices(given or {}, name, chosen.options)
    chosen.refuse(Source(run=run, config=config, checkpoint=None, tokenizer=tokenizer_sources(config)), choices)
    checkpoint = choose_checkpoint(run, named)
    if checkpoint is None and chosen.needs_tuned:
        raise InputError(f"{COMMAND_LINE}: --checkpoint none: there is nothing tuned to export as {name}")
    with new_folder(output) as folder, quiet_transformers():
        data = samples_for_proof(config, chosen, proof_samples)
        facts = weights_used(
            run, config, checkpoint, made_of(config) if chosen.reads_base or data is not None else None
        )
        source = source_of(run, config, checkpoint, data, facts)
        try:
            written = chosen.write(folder, source, choices) or Written()
            write_json(folder / ORIGIN, _origin(name, source, choices, written))
            proven = _prove(folder, chosen, source, choices, data)
            write_card(folder, output.name, name, chosen, source, choices, written, proven)
        except ProofFailed as error:
            raise ProofFailed(f"{error}; {output} was not left there") from None
        except SafetensorError as error:  # a full disk, among others
            raise InputError(f"{output}: could not be written ({error}); nothing was left there") from None
    print(f"{output}: {name} folder of {checkpoint.path if checkpoint is not None else 'the untuned model'}")
    for note in written.notes:
        print(note)
    if proven is not None:
        shown = (
            f"{proven['answers_equal']} of {len(proven['samples'])} answers equal, logits within "
            f"{proven['max_relative_error']:.1e} of the run's own (fp32)"
        )
        print(f"proven by {proven['read_by']}: {shown}")


def _origin(name: str, source: Source, choices: Choices, written: Written) -> dict[str, Any]:
    """What the folder says of where it comes from."""
    notes = {"notes": written.notes} if written.notes else {}
    belongs = {} if source.checkpoint is None else {"belongs_to": source.checkpoint.belongs_to}
    head = {"run": str(source.run), "format": name, "dtype": choices.dtype}
    return {**head, **source.facts, **written.facts, **notes, **belongs}


def _prove(
    folder: Path, chosen: Format, source: Source, choices: Choices, data: ProofData | None
) -> dict[str, Any] | None:
    """The proof by samples; None, and a file that says so, without."""
    if data is None:
        write_unproven(folder)
        return None
    logger.info(
        "proof: %d sample(s) of %s are asked of the run's model, and of the folder in a clean process",
        len(data.samples),
        data.file,
    )
    return prove(folder, chosen.proof, source, choices, data)


def source_of(
    run: Path, config: Config, checkpoint: Checkpoint | None, data: ProofData | None, facts: dict[str, Any]
) -> Source:
    """The model that is exported, or was. `facts`: see `weights_used`. Raises InputError where the weights that the run
    began with are gone."""
    return Source(
        run=run,
        config=config,
        checkpoint=checkpoint,
        before=weights_before(run, config) if checkpoint is None else None,
        tokenizer=tokenizer_sources(config),
        asked=how_run_was_asked(run, config),
        facts=facts,
        max_new_tokens=data.max_new_tokens if data is not None else config.eval.max_new_tokens or Source.max_new_tokens,
    )


def proof_samples_of(arguments: Arguments) -> int | None:
    """How many samples the proof asks; None for none. Raises InputError for what is no number of samples."""
    proof, count = (
        arguments.last("proof"),
        arguments.whole("proof-samples", 1, 10_000, "; for an export without a proof: --proof none"),
    )
    if proof is not None:
        if proof != "none":
            raise InputError(f"{COMMAND_LINE}: --proof: found '{proof}', expected none, or leave it out")
        if count is not None:
            raise InputError(f"{COMMAND_LINE}: --proof-samples: has no effect with --proof none; leave one of both out")
        return None
    return PROOF_SAMPLES if count is None else count


def samples_for_proof(config: Config, chosen: Format, proof_samples: int | None) -> ProofData | None:
    """Samples of the run's evaluation data; None: of `proof_samples` None. Raises InputError where they are not
    there."""
    if proof_samples is None:
        return None
    tried = []
    for one in each_set(config).values():  # of a mixture the first set that has some
        for split in dict.fromkeys((one.data.test_split, one.data.eval_split)):
            try:
                file = samples_file(one, split)
            except InputError as error:
                tried.append(str(error))
                continue
            if file.is_file():
                return proof_data(one, file, proof_samples, chosen.proof.takes)
            tried.append(str(file))
    raise InputError(
        f"proof: the run's evaluation samples are not there ({'; '.join(tried)}); restore them, or export "
        "unproven: --proof none"
    )


def _choices(given: dict[str, str], name: str, options: frozenset[str]) -> Choices:
    """Raises InputError for an option that the format does not read, and for an unknown dtype."""
    for option in given:
        if option not in options:
            raise InputError(f"{COMMAND_LINE}: --{option}: has no effect on the format {name}; leave it out")
    if given.get("dtype", "fp32") not in DTYPES:
        raise InputError(f"{COMMAND_LINE}: --dtype: found '{given['dtype']}', expected one of {', '.join(DTYPES)}")
    return Choices(**given)
