"""A finished run: its recipe, the checkpoint that is asked for, and whether it belongs to the weights that are there
now."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vltrain.config.mixture import each_set
from vltrain.config.older_runs import ADDED, complete
from vltrain.config.recipe import RECIPE, build_config, read_recipe
from vltrain.config.schema import Config
from vltrain.config.stages import stage_folders
from vltrain.data.sample_files import samples_file
from vltrain.data.text.asked import Asked, how_asked, in_common
from vltrain.errors import InputError
from vltrain.files.strict_json import read_object
from vltrain.receipts.manifest import BEST, MANIFEST, pointed
from vltrain.train.checkpoints.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from vltrain.train.run.identity import MADE_OF, ORIGIN, FilesOf, by_digest, require_same_model, tell_unknown_files
from vltrain.train.run.origin import open_origin
from vltrain.train.run.provenance import RUN

logger = logging.getLogger(__name__)


def require_run(run: Path, *others: str) -> None:
    """Raises InputError if `run` is not the folder of a run: without its recipe, or a file of the names `others`."""
    if stages := stage_folders(run):
        raise InputError(f"{run}: a run in stages, expected one of them: {', '.join(map(str, stages))}")
    for name in (RECIPE, *others):
        if not (run / name).is_file():
            raise InputError(f"{run}: no {name} in it, expected the folder of a run (the recipe's `output`)")


def recipe_of(run: Path, *others: str) -> Config:
    """The resolved recipe of the run in that folder. Raises InputError as `require_run`."""
    require_run(run, *others)
    return build_config(complete(read_recipe(run / RECIPE)))


def recorded_identity(run: Path) -> dict[str, Any]:
    """What the run says of itself (`run.json`), see `vltrain.train.run.identity`; {} where its version kept nothing.
    Raises InputError."""
    return _recorded(run, "identity")


def how_run_was_asked(run: Path, config: Config) -> Asked | None:
    """How its training questions were put: as it recorded, else as its samples say where they still are; None where
    nobody knows.

    Raises: InputError for a record that cannot be read.
    """
    recorded = Asked.from_json(_recorded(run, "data").get("asked"))
    if recorded is not None:
        return recorded
    sets = each_set(config).values()
    try:
        asked = [how_asked(samples_file(one, one.data.train_split)) for one in sets]
    except InputError:
        return None
    return in_common([one for one in asked if one is not None])


def _recorded(run: Path, name: str) -> dict[str, Any]:
    if not (run / RUN).exists():
        return {}
    found = read_object(run / RUN, "what the run was made of").get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"{run / RUN}: {name}: found {found!r:.80}, expected an object; the file was changed")
    return found


def tell_edits(run: Path) -> None:
    """Warns of settings that were edited in the run's recipe since the run wrote it. Raises InputError where one of
    both cannot be read."""
    wrote = _recorded(run, "settings")
    if not wrote:
        return
    for key, now in complete(read_recipe(run / RECIPE)).items():
        if key == "output" or key in by_digest():  # folders move
            continue
        before: Any = wrote
        for name in key.split("."):
            before = before.get(name, ADDED.get(key)) if isinstance(before, dict) else before
        now = list(now) if isinstance(now, tuple) else now
        if before != now:
            logger.warning("%s was edited since the run wrote it: %s was %r, is %r", run / RECIPE, key, before, now)


def weights_before(run: Path, config: Config) -> Checkpoint | None:
    """The trained weights that a run began with, of `train.init_from`; None for fresh ones. Raises InputError where
    they are not there any more."""
    if config.train.init_from is None:
        return None
    found = open_origin(Path(config.train.init_from).expanduser(), run)
    began = recorded_identity(run).get(ORIGIN, {})
    if isinstance(began, dict) and began.get("digest", found.digest) != found.digest:
        told = (
            f"it began with step {began.get('step')} of {began.get('path')}, and {found.path} is of step "
            f"{found.step}, or of another run"
        )
        raise InputError(f"{run}: its untuned weights cannot be found: {told}; restore them, or name a checkpoint")
    return found


def weights_used(
    run: Path,
    config: Config,
    checkpoint: Checkpoint | None,
    files: FilesOf | None,
    changed_on_purpose: Collection[str] = (),
) -> dict[str, Any]:
    """Which weights a program uses, as plain JSON, after it was checked that they belong together.

    Args:
        run: whose recipe `config` is.
        checkpoint: the tuned weights; None: the model before tuning.
        files: digests of what the others are read from, see `vltrain.train.run.made_of`; None where they are not read.
        changed_on_purpose: the settings of the command line, by dotted name.

    Raises: InputError if the recipe in the run's folder, or a file of its weights, is not what the weights were trained
    with.
    """
    tell_edits(run)
    identity = checkpoint.belongs_to if checkpoint is not None else recorded_identity(run)
    where = str(checkpoint.path if checkpoint is not None else run)
    require_same_model(identity, config, files, where, changed_on_purpose)
    if files is not None:
        tell_unknown_files(identity, where)
    tuned = (
        None
        if checkpoint is None
        else {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest}
    )
    changed = sorted(key for key in changed_on_purpose if key.startswith("model."))
    began = {ORIGIN: identity[ORIGIN]} if ORIGIN in identity else {}
    return {
        "checkpoint": tuned,
        **began,
        MADE_OF: files if files is not None else identity.get(MADE_OF, {}),
        "changed_settings": changed,
    }


def choose_checkpoint(folder: Path, named: str | None) -> Checkpoint | None:
    """The checkpoint to use: the run's newest whole one, its best, the one that is named, or None for `none`; of a
    folder that `vltrain export --format adapters` wrote, itself.

    Raises: InputError if the run has none, or the named one is damaged.
    """
    if named == "none":
        return None
    if named == BEST:
        best = pointed(folder / "checkpoints", BEST)
        if best is None:
            root = folder / "checkpoints"
            raise InputError(
                f"{root}: no best checkpoint in it; train with train.keep_best, or leave --checkpoint out for "
                "the newest"
            )
        return open_checkpoint(best)
    if named is not None:
        return open_checkpoint(Path(named))
    if (folder / MANIFEST).is_file():
        return open_checkpoint(folder)
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is None:
        root = folder / "checkpoints"
        raise InputError(
            f"{root}: no complete checkpoint in it; train the run first, or evaluate the untuned model with "
            "--checkpoint none"
        )
    return newest
