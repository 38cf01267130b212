"""Options of a source: `key=value` from a command line or typed values from a recipe, checked against what the source declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vltrain.errors import InputError, nearest


def settle(source: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, overridden by what is given and converted to the default's type (None takes text, a tuple a list or `a,b,c`).

    Raises:
        InputError: an unknown option, or a value that is not of the option's type.
    """
    settled = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            hint = nearest(name, defaults) if defaults else "it has none"
            raise InputError(f"source '{source}' has no option '{name}'; {hint}")
        kind = str if defaults[name] is None else type(defaults[name])
        try:
            settled[name] = tuple(value.split(",")) if kind is tuple and isinstance(value, str) else kind(value)
        except (TypeError, ValueError):
            raise InputError(f"source '{source}', option '{name}': found {value!r}, expected {kind.__name__}") from None
    return settled


def choose(source: str, name: str, value: str, known: Iterable[str]) -> str:
    """`value`, one of `known`. Raises InputError naming the option and the nearest."""
    if value not in known:
        raise InputError(f"source '{source}', option '{name}': unknown '{value}', {nearest(value, known)}")
    return value
