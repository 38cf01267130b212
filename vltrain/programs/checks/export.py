"""`vltrain check export FOLDER`: the proof of an exported folder once more, see `vltrain.export.proof`."""

from __future__ import annotations

from pathlib import Path

from vltrain.config.command_line import Arguments
from vltrain.errors import InputError
from vltrain.export.format import DTYPES, Choices
from vltrain.export.proof import PROOF, ProofFailed, measure
from vltrain.export.table import find_format
from vltrain.files.strict_json import read_object
from vltrain.inference.run import choose_checkpoint, recipe_of, weights_used
from vltrain.programs.export import proof_samples_of, samples_for_proof, source_of
from vltrain.receipts.verify import Proof
from vltrain.train.run.lora_folder import EXPORTED
from vltrain.train.run.made_of import made_of


def check_export(folder: Path, run: Path | None, arguments: Arguments) -> Proof:
    """Asks the folder and the run that it was made of the same samples.

    Args:
        run: None: the one that the folder names.
        arguments: the command line, for the number of samples.

    Raises: InputError for a folder that no export wrote, and where its run, checkpoint or samples are not there any
    more.
    """
    if not (folder / EXPORTED).is_file():
        raise InputError(f"{folder}: no {EXPORTED} in it, expected a folder that `vltrain export` wrote")
    origin = read_object(folder / EXPORTED, "what the folder was made of")
    named, form, dtype, tuned = (origin.get(name) for name in ("run", "format", "dtype", "checkpoint"))
    if (
        type(named) is not str
        or type(form) is not str
        or dtype not in DTYPES
        or not (tuned is None or isinstance(tuned, dict))
    ):
        raise InputError(
            f"{folder / EXPORTED}: expected run, format, dtype and checkpoint; it was changed, or written by an "
            "older version: export the run anew"
        )
    place = run or Path(named)
    if not place.is_dir():
        raise InputError(
            f"{folder}: was made of {named}, which no longer exists there; name its new place: --run FOLDER"
        )
    config = recipe_of(place)
    _, chosen = find_format(config.model.architecture, form, str(folder / EXPORTED))
    checkpoint = choose_checkpoint(
        place, "none" if tuned is None else str(place / "checkpoints" / Path(str(tuned.get("path"))).name)
    )
    if checkpoint is not None and tuned is not None and checkpoint.digest != tuned.get("digest"):
        raise InputError(
            f"{folder}: was made of step {tuned.get('step')} of {named}, and {checkpoint.path} holds other "
            "weights; name the run that it was made of: --run FOLDER"
        )
    data = samples_for_proof(config, chosen, proof_samples_of(arguments))
    assert data is not None, "only --proof none leaves it out, which is no option here"
    facts = weights_used(place, config, checkpoint, made_of(config))
    try:
        found = measure(
            folder, chosen.proof, source_of(place, config, checkpoint, data, facts), Choices(dtype=dtype), data
        )
    except ProofFailed as error:
        return Proof(facts=[], failures=[str(error)])
    told = [
        f"{folder}: read by {found['read_by']}",
        f"{found['answers_equal']} of {len(found['samples'])} answers are the run's own",
    ]
    told.append(
        f"logits within {found['max_relative_error']:.1e} of the run's own (allowed "
        f"{found['bound_of_relative_error']:g}, {dtype})"
    )
    if (folder / PROOF).is_file() and read_object(folder / PROOF).get("proven") is not True:
        told.append(f"{PROOF} says that it was exported unproven; this check leaves it as it is")
    return Proof(facts=told, failures=[])
