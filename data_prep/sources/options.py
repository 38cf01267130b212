"""Options of a source: `key=value` from a command line or typed values from a recipe, checked against what the source
declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vltrain.config.ranges import Range
from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import is_sequence


def resolve_options(
    source: str, given: Mapping[str, Any], defaults: Mapping[str, Any], ranges: Mapping[str, Range] = {}
) -> dict[str, Any]:
    """The defaults, overridden by what is given: of the default's type, or its text (None takes text, a tuple a list or
    `a,b,c`).

    Args:
        ranges: of the options that are numbers.

    Raises:
        InputError: an unknown option, or a value that is not of the option's type or out of its range.
    """
    resolved = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            hint = nearest(name, defaults) if defaults else "it has none"
            raise InputError(f"source '{source}' has no option '{name}'; {hint}")
        default: object = defaults[name]
        kind: type[object] = str if default is None else type(default)
        try:
            resolved[name] = None if value is None and defaults[name] is None else _read(value, kind)
        except ValueError:
            raise InputError(f"source '{source}', option '{name}': found {value!r}, expected {kind.__name__}") from None
        if name in ranges:
            ranges[name].require(f"source '{source}', option '{name}'", resolved[name])
    if _asked:
        raise _Resolved(resolved)
    return resolved


class _Resolved(Exception):
    """Carries a reader's options out of it before it reads anything."""


_asked = False


def all_options(read: Callable[[None, Mapping[str, Any]], Iterator[Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a reader, those at their default too, by the `resolve_options` that each begins with. Raises
    InputError as that does."""
    global _asked
    _asked = True
    try:
        next(read(None, given), None)
    except _Resolved as found:
        return found.args[0]
    finally:
        _asked = False
    raise AssertionError(f"{read.__module__}: a reader begins with `resolve_options`")


def _read(value: Any, kind: Callable[..., object]) -> Any:
    """`value` as a `kind`, if it is one or its text. Raises ValueError: nothing else is converted."""
    if kind is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if is_sequence(parts) and all(isinstance(part, str) for part in parts):
            return tuple(parts)
    elif type(value) in (kind, *((int,) if kind is float else ()), *((str,) if kind in (int, float) else ())):
        return kind(value)
    raise ValueError


def choose(source: str, name: str, value: str, known: Iterable[str]) -> str:
    """`value`, one of `known`. Raises InputError naming the option and the nearest."""
    if value not in known:
        raise InputError(f"source '{source}', option '{name}': unknown '{value}', {nearest(value, known)}")
    return value
