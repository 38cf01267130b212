"""`vltrain check weights RUN`: every file that the run's weights are in, read anew and compared with the digests that
the run keeps."""

from __future__ import annotations

from pathlib import Path

from vltrain.config.command_line import load_settings
from vltrain.config.recipe import RECIPE
from vltrain.errors import InputError
from vltrain.inference.run import recorded_identity, require_run
from vltrain.receipts.manifest import checkpoints_in
from vltrain.receipts.verify import Proof
from vltrain.train.checkpoints.checkpoint import open_checkpoint
from vltrain.train.run.identity import MADE_OF, require_same_model
from vltrain.train.run.made_of import made_of


def check_weights(run: Path, overrides: list[str]) -> Proof:
    """What was found.

    Args:
        overrides: settings on top of the run's recipe, such as a folder's new path.

    Raises: InputError where there is nothing to compare with, or a file that the recipe names is not there.
    """
    require_run(run)
    words = [str(run), *overrides]
    settings = load_settings(
        words,
        program="vltrain check weights",
        positionals=("run",),
        default_recipe=run / RECIPE,
        default_is_checked=True,
    )
    proof, identities = Proof(), {}
    if recorded := recorded_identity(run):
        identities[str(run)] = recorded
    for path in checkpoints_in(run / "checkpoints"):
        try:
            identities[str(path)] = open_checkpoint(path).belongs_to
            proof.facts.append(f"{path.name}: every byte as it was written")
        except InputError as error:
            proof.failures.append(str(error))
    if not any(MADE_OF in identity for identity in identities.values()):
        raise InputError(
            f"{run}: keeps no digests of frozen weights, since an older version made it, or nothing of it is "
            "left to read"
        )
    files = made_of(settings.config, verify=True)
    before = len(proof.failures)
    for where, identity in identities.items():
        try:
            require_same_model(identity, settings.config, files, where)
        except InputError as error:
            proof.failures.append(str(error))
    if len(proof.failures) == before:
        count = sum(map(len, files.values()))
        proof.facts.append(
            f"frozen weights and tokenizer: {count} file(s) of {', '.join(sorted(files))} as the run found them"
        )
    return proof
