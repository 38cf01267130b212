"""Options of a source: `key=value` from a command line or typed values from a recipe, checked against what the source declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vltrain.errors import InputError, nearest


def settle(source: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, overridden by what is given and converted to the default's type (a default of None takes text).

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
            settled[name] = kind(value)
        except (TypeError, ValueError):
            raise InputError(f"source '{source}', option '{name}': found {value!r}, expected {kind.__name__}") from None
    return settled
