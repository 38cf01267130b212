"""What a run of an older version means where it is silent: a setting that was added since has the value of how things
were done before.

A run stores its whole resolved recipe, so a key that is missing there is one that its version did not know. Its default
of today may be another thing than what the run did.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

from vltrain.config.keys import keys_of, known_keys
from vltrain.config.model.architectures import DEFAULT, KEY
from vltrain.config.schema import Config
from vltrain.config.strict_yaml import is_mapping

logger = logging.getLogger(__name__)

ADDED: dict[str, Any] = {
    "data.cache": None,
    "data.cache_gib": 32.0,
    "data.fraction": 1.0,
    "data.fraction_seed": 0,
    "data.mixture": {},
    "data.mixture_by": "passes",
    "data.when_a_set_ends": "repeat",
    "eval.precision": "train",
    "eval.spread": "even",
    "model.adapter.bias": True,
    "model.adapter.residual": True,
    "model.adapter.vision_kind": None,
    "model.instructblip.preprocessing": "square",
    "model.vision.blocks": None,
    "model.vision.image_size": None,
    "model.vision.peft.alpha": 16.0,
    "model.vision.peft.dropout": 0.0,
    "model.vision.peft.kind": None,
    "model.vision.peft.rank": 8,
    "model.vision.peft.targets": ("q_proj", "v_proj"),
    "model.vision.pool": 1,
    "model.vision.preprocessing": "square",
    "model.vision.tokens": "cls",
    "optim.projector_lr": None,
    "train.balance": "flops",
    "train.check": "quick",
    "train.init_from": None,
    "train.keep_image_features": False,
    "train.loggers": ("tensorboard",),
}
"""Every setting that was added since the first runs, by dotted name, with the value that does what was done without it.
A setting that is declared in `vltrain.config.schema` and is missing here fails a test."""

DEFAULTS_BEFORE: dict[str, tuple[Any, ...]] = {"eval.max_new_tokens": (8,)}
"""Defaults that were others before: a stored recipe names every setting, so one of these there may be what nobody asked
for."""


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored recipe (dotted name -> value) that its architecture has, with those that its version did
    not know."""
    own = keys_of(stored.get(KEY, DEFAULT))
    return {key: value for key, value in {**ADDED, **stored}.items() if key in own}


def is_default(key: str, value: Any) -> bool:
    """Whether a recipe's value may be what its version had for a default."""
    return value == known_keys()[key].default or value in DEFAULTS_BEFORE.get(key, ())


def value_before(key: str) -> Any:
    """What a run did that says nothing about a setting; None for what is no setting."""
    if key in ADDED:
        return ADDED[key]
    return known_keys()[key].default if key in known_keys() else None


def as_begun(config: Config, identity: Mapping[str, Any], given: Collection[str]) -> Config:
    """The settings of a run that goes on: one that was added since it began, and that nobody set, stays as it was then,
    which is told.

    Args:
        identity: of the run, see `vltrain.train.run.identity`; checkpoints of a life in this version say the setting,
            with the old value.
        given: the dotted keys that the recipe or the command line sets.
    """
    for key, before in ADDED.items():
        *sections, name = key.split(".")
        section: Any = dict(identity)
        for one in sections:
            section = section.get(one) if is_mapping(section) else None
        if key in given or not is_mapping(section) or section.get(name, before) != before:
            continue
        now = _replaced(config, key, before)
        if now != config:
            logger.warning("%s: %r, as the run began; a new one would have %r", key, before, known_keys()[key].default)
        config = now
    return config


def _replaced(section: Any, key: str, value: Any) -> Any:
    name, _, inner = key.partition(".")
    return dataclasses.replace(section, **{name: _replaced(getattr(section, name), inner, value) if inner else value})
