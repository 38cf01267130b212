"""What a run is: its settings, its packs, and the files that its frozen weights and its tokenizer were read from, by
their digests.

Kept in each checkpoint (`belongs_to`) and in run.json, and compared whenever the run's weights are used: by a resume
whole, by evaluation, export and replay as far as the model goes. Where a file's digest is known its path does not
count: folders may move. What a run of an older version does not say has the value of what was done then
(`vltrain.config.older_runs`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch.distributed as dist

from vltrain.config.model.architectures import keys_of_all
from vltrain.config.older_runs import ADDED
from vltrain.config.schema import Config
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.receipts.manifest import checksum
from vltrain.receipts.verify import RUN_ID
from vltrain.train.checkpoints.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

FilesOf = dict[str, dict[str, str]]
"""The setting that names them -> file's name -> SHA-256 (hex)."""
MADE_OF, ORIGIN = "made_of", "origin"
IN_TRAIN = ("epochs", "max_steps", "packs_per_step", "precision", "seed")


def by_digest() -> tuple[str, ...]:
    """Keys that name paths, which may change where the digests of what is there are known."""
    return keys_of_all("PATHS")


def run_identity(
    config: Config, dataset: PackedDataset, made_of: FilesOf | None = None, origin: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What must be equal for two runs to have the same steps: not ranks, ZeRO stage, workers, logging or evaluation.

    Args:
        made_of: see `vltrain.train.run.made_of`; None: not known.
        origin: where its trained weights began, see `vltrain.train.run.origin`; None: fresh.
    """
    train = {name: getattr(config.train, name) for name in IN_TRAIN}
    if config.train.keep_image_features:  # images are encoded in other company, which rounds otherwise
        train["keep_image_features"] = True
    identity = {
        "model": config.model.identity(),
        "optim": dataclasses.asdict(config.optim),
        "train": train,
        "data": dataset.manifest.checksum,
    }
    if dataset.manifest.mixture is not None:  # which the checksum covers: to say what is different
        identity["mixture"] = dataset.manifest.mixture
    if made_of is not None:
        identity[MADE_OF] = made_of
    if origin is not None:
        identity[ORIGIN] = origin
    return as_stored(identity)


def as_stored(value: Any) -> Any:
    """As it comes back from a checkpoint: tuples are lists there."""
    return json.loads(json.dumps(value))


def run_id(belongs_to: dict[str, Any], checkpoint: Checkpoint | None) -> str:
    """What the run's receipt calls it: follows from the identity with which it began, which later versions may spell
    otherwise."""
    if checkpoint is None:
        return checksum(belongs_to)
    return checkpoint.run_state.get(RUN_ID) or checksum(checkpoint.belongs_to)


def require_same_run(checkpoint: Checkpoint, belongs_to: dict[str, Any]) -> None:
    """Raises InputError, naming each difference, if a run described by `belongs_to` cannot go on exactly from the
    checkpoint."""
    found = list(differences(checkpoint.belongs_to, belongs_to))
    if found:
        changes = "; ".join(found)
        raise InputError(
            f"{checkpoint.path}: belongs to another run: {changes}. Restore this, or start a new run from these "
            "weights: another --output with "
            f"--train.init_from {checkpoint.path}"
        )


def tell_unknown_files(identity: dict[str, Any], where: object) -> None:
    """Warns of a run of an older version, which kept no digests."""
    if MADE_OF not in identity:
        logger.warning(
            "%s: was made before digests of frozen weights were kept: changes since cannot be detected",
            where,
        )


def require_same_model(
    belongs_to: dict[str, Any],
    config: Config,
    made_of: FilesOf | None,
    where: str,
    changed_on_purpose: Collection[str] = (),
) -> None:
    """Raises InputError if the weights of a run that is described by `belongs_to` are not those of the model that
    `config` describes.

    Args:
        where: whose weights they are, for the error.
        changed_on_purpose: dotted keys that the command line sets.
    """
    if "model" not in belongs_to:  # older than that
        return
    saved = {name: belongs_to[name] for name in ("model", MADE_OF) if name in belongs_to}
    now = {"model": config.model.identity(), **({MADE_OF: made_of} if made_of is not None else {})}
    # Without digests nothing tells a folder that has moved from another one: where none were kept that is warned of,
    # see `tell_unknown_files`.
    unknown = () if MADE_OF in saved and made_of is not None else by_digest()
    found = list(differences(saved, as_stored(now), {*changed_on_purpose, *unknown}))
    if found:
        changes = "; ".join(found)
        raise InputError(
            f"{where}: these weights were trained in another model: {changes}. Restore this (a folder that has "
            "moved may be named by its new path)"
        )


def differences(saved: dict[str, Any], now: dict[str, Any], ignored: Collection[str] = ()) -> Iterator[str]:
    """What differs between two identities, each in words; nothing of the dotted keys `ignored`, unless they name files
    that are known to be others."""
    if MADE_OF in saved and MADE_OF in now:
        ignored = set(ignored) - set(by_digest())
    yield from (text for key, text in differing(saved, now) if not is_within(key, ignored))


def differing(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What differs between two identities: (dotted key, in words)."""
    saved, now = copy.deepcopy(saved), copy.deepcopy(now)
    began, begins = saved.pop(ORIGIN, None), now.pop(ORIGIN, None)
    if _digest_of(began) != _digest_of(begins):
        yield "train.init_from", f"train.init_from was {_origin_in_words(began)}, is {_origin_in_words(begins)}"
    were, are = saved.pop(MADE_OF, None), now.pop(MADE_OF, None)
    if isinstance(were, dict) and isinstance(are, dict):
        for key in by_digest():
            path_before, path_now = _take(saved, key), _take(now, key)
            if key in were or key in are:
                yield from (
                    (key, text)
                    for text in _changed_files(key, _as_texts(were.get(key, {})), _as_texts(are.get(key, {})), path_now)
                )
            elif path_before != path_now:
                yield key, f"{key} was {path_before!r}, is {path_now!r}"
    yield from _differing(saved, now, "")


def _digest_of(origin: Any) -> Any:
    return origin.get("digest") if isinstance(origin, dict) else origin


def _origin_in_words(origin: Any) -> str:
    return f"{origin.get('path')} at step {origin.get('step')}" if isinstance(origin, dict) else "null"


def value_at(identity: Any, key: str) -> Any:
    """The value of a dotted key in plain JSON; None where it has none."""
    for name in key.split("."):
        identity = identity.get(name) if isinstance(identity, dict) else None
    return identity


def is_within(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of `keys`, or below one."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _take(identity: dict[str, Any], key: str) -> Any:
    """Takes a setting out of an identity; None where it has none."""
    *sections, name = key.split(".")
    for section in sections:
        identity = identity.get(section, {})
        if not isinstance(identity, dict):
            return None
    return identity.pop(name, None)


def _as_texts(files: Any) -> dict[str, str]:
    """Of what a manifest says: anything may stand there."""
    return {name: str(digest) for name, digest in files.items()} if isinstance(files, dict) else {}


def _changed_files(key: str, were: dict[str, str], are: dict[str, str], place: str | None) -> Iterator[str]:
    if sorted(were.values()) == sorted(are.values()) and len(were) == 1:
        return  # one file, which may be called otherwise
    where = f"{key}: {place}" if place else key
    for name in sorted(were.keys() | are.keys()):
        before, after = were.get(name), are.get(name)
        if before != after:
            changed = (
                f"has changed (SHA-256 was {before[:12]}..., is {after[:12]}...)"
                if before and after
                else "is gone"
                if before
                else "is new"
            )
            yield f"{where}: {name} {changed}"


def _differing(saved: Any, now: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            here = f"{path}.{key}" if path else key
            before = (
                {} if isinstance(now.get(key), dict) else as_stored(ADDED.get(here))
            )  # of a setting that its version did not know
            yield from _differing(saved.get(key, before), now.get(key), here)
    elif saved != now:
        yield path, f"{path} was {saved!r}, is {now!r}"


def agreed_over_nodes(made_of: FilesOf | None) -> FilesOf:
    """What rank 0's node found, on every rank. A collective.

    Args:
        made_of: on one rank of each node; None on the others.

    Raises: InputError on every rank if nodes have other files under the same names.
    """
    gathered: list[FilesOf | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, made_of)
    first = gathered[0]
    assert first is not None, "rank 0 is the first of its node"
    for rank, other in enumerate(gathered):
        if other is not None and other != first:
            changes = "; ".join(differences({MADE_OF: first}, {MADE_OF: other}))
            raise InputError(f"rank {rank}'s node has other files than rank 0's: {changes}; copy them anew")
    return first
