"""What a run of an older version means where it is silent: a setting that was added since has the value of how things were done before.

A run stores its whole resolved recipe, so a key that is missing there is one that its version did not know. Its default of today may be
another thing than what the run did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vltrain.recipe import known_keys

ADDED: dict[str, Any] = {
    "eval.precision": "train",
    "model.adapter.residual": True,
    "model.adapter.vision_kind": None,
    "model.instructblip.preprocessing": "square",
    "model.vision.preprocessing": "square",
    "train.init_from": None,
}
"""Every setting that was added since the first runs, by dotted name, with the value that does what was done without it. A setting that is
declared in `vltrain.config` and is missing here fails a test."""

DEFAULTS_BEFORE: dict[str, tuple[Any, ...]] = {"eval.max_new_tokens": (8,)}
"""Defaults that were others before: a stored recipe names every setting, so one of these there may be what nobody asked for."""


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored recipe (dotted name -> value), with those that its version did not know."""
    return {**ADDED, **stored}


def is_default(key: str, value: Any) -> bool:
    """Whether a recipe's value may be what its version had for a default."""
    return value == known_keys()[key].default or value in DEFAULTS_BEFORE.get(key, ())


def value_before(key: str) -> Any:
    """What a run did that says nothing about a setting; None for what is no setting."""
    if key in ADDED:
        return ADDED[key]
    return known_keys()[key].default if key in known_keys() else None
