"""`train.init_from`: a new run that begins with the trained weights of another, in place of fresh ones.

Taken are the trained parameters alone, by name and shape, bit for bit; what the other run trained nothing of (adapters,
behind a neck that was trained alone) begins as it would without. Optimizer, schedule, data, ranks and ZeRO stage are
the new run's. The frozen weights below them must be the same, by the digests of their files. Whatever else of the model
is different (an adapter's scale, which makes another function of the same weights; `model.bits`) is told in the log.
Where a run began is kept in its identity and in run.json, so its origin is not needed any more once it has a checkpoint
of its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vltrain.config.model.architectures import KEY as ARCHITECTURE
from vltrain.config.model.architectures import keys_of_all
from vltrain.config.schema import Config
from vltrain.config.stages import last_stage
from vltrain.errors import InputError
from vltrain.receipts.manifest import BEST, MANIFEST, pointed
from vltrain.train.checkpoints.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from vltrain.train.run.identity import (
    MADE_OF,
    ORIGIN,
    FilesOf,
    as_stored,
    differing,
    is_within,
    value_at,
)
from vltrain.train.run.lora_folder import is_lora_folder, open_lora_folder

logger = logging.getLogger(__name__)

KEY = "train.init_from"


def with_peft_folder(config: Config) -> Config:
    """The recipe with a folder of peft's in `train.init_from` in its place: that of the key of its model's section
    (`model.instructblip.adapters`) which says how such a folder is read."""
    named = config.train.init_from
    model = None if named is None else config.model.started_from(named)
    if named is None or model is None or model.start is None:
        return config
    place = Path(named).expanduser()
    if not (place / "adapter_config.json").is_file() or (place / MANIFEST).is_file():
        return config
    logger.info("%s: %s is a peft folder: read as %s", KEY, named, model.start[0])
    return replace(config, model=model, train=replace(config.train, init_from=None))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run began. `facts`: path, step and digest, plain JSON; `checkpoint`: None where the run goes on from one
    of its own."""

    facts: dict[str, Any]
    checkpoint: Checkpoint | None


def find_origin(config: Config, checkpoint: Checkpoint | None) -> Origin | None:
    """The origin that the recipe names; None where it names none.

    Args:
        checkpoint: of the run itself, which it goes on from.

    Raises: InputError for a folder without usable weights.
    """
    named = config.train.init_from
    if named is None:
        return None
    began = checkpoint.belongs_to.get(ORIGIN) if checkpoint is not None else None
    if isinstance(began, dict) and began.get("path") == named:
        return Origin(facts=began, checkpoint=None)
    found = open_origin(Path(named).expanduser(), Path(config.output))
    return Origin(
        facts={"path": named, "step": found.step, "digest": found.digest},
        checkpoint=None if checkpoint is not None else found,
    )


def open_origin(place: Path, output: Path) -> Checkpoint:
    """The checkpoint that `place` stands for: itself; of a run's folder the one named `best` where there is one, else
    the newest.

    Raises: InputError where there is none, or it is the run's own.
    """
    expected = (
        "expected a run's folder, one of its checkpoints (RUN/checkpoints/step-...), or an exported folder "
        "(--format adapters; lora of a run with nothing but LoRA)"
    )
    place = last_stage(place)
    if not place.is_dir():
        raise InputError(f"{KEY}: {place}: no such folder, {expected}")
    if place.resolve() == output.resolve() or output.resolve() in place.resolve().parents:
        raise InputError(
            f"{KEY}: {place} is this run's own folder: go on with it by --resume auto, or choose another output "
            "for a new run"
        )
    if (place / MANIFEST).is_file():
        return replace(open_checkpoint(place), is_origin=True)
    if is_lora_folder(place):
        return open_lora_folder(place)
    if (place / "adapter_config.json").is_file():
        raise InputError(
            f"{KEY}: {place} is a peft folder, which an InstructBLIP's run can begin with, and this is "
            f"another architecture's; {expected}"
        )
    root = place / "checkpoints"
    best = pointed(root, BEST)
    found = open_checkpoint(best) if best is not None else newest_checkpoint(root)
    if found is None:
        raise InputError(f"{KEY}: {place}: no checkpoint in it, {expected}")
    return replace(found, is_origin=True)


def require_same_frozen(origin: Checkpoint, config: Config, files: FilesOf) -> None:
    """Raises InputError if the origin's weights were trained over other frozen weights; tells what else of the model is
    different."""
    saved = {name: origin.belongs_to[name] for name in ("model", MADE_OF) if name in origin.belongs_to}
    if "model" not in saved:
        logger.warning("%s: %s does not say which model it was trained in", KEY, origin.path)
        return
    now: dict[str, Any] = as_stored({"model": config.model.identity(), MADE_OF: files})
    if MADE_OF not in saved:
        logger.warning(
            "%s: %s was saved before digests of frozen weights were kept: paths are compared in their place",
            KEY,
            origin.path,
        )
    sources = [f"model.{key}" for key in config.model.PATHS if key.endswith("source")]
    is_random = any(value_at(saved, key) is None for key in sources)
    for key, text in differing(saved, now):
        if key == "model.adapter.bias":
            raise InputError(
                f"{KEY}: {origin.path}: {text}: adapters with biases and without have other parameters. Set it "
                f"as there, or train anew without {KEY}"
            )
        if is_within(key, (ARCHITECTURE, *keys_of_all("FROZEN"))) or (key == "model.seed" and is_random):
            raise InputError(
                f"{KEY}: {origin.path} was trained over other frozen weights: {text}. Name these, or train anew "
                f"without {KEY}"
            )
        if key not in (
            "model.instructblip.adapters",
            "model.tune",
        ):  # where the origin itself began; what begins anew is told by itself
            logger.warning("%s: in the run of %s %s", KEY, origin.path, text)
