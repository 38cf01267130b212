"""The range of every number that a recipe may hold, declared beside its default and checked in one place; and where
names are registered.

    lr: float = number(1e-3, 0, 10, open_low=True)                     anything in (0, 10]
    scorer: str = named("vltrain.evaluate.report.SCORERS", "exact")    a name of that table

A dataclass of settings calls `check_ranges` in its `__post_init__`; a recipe's reader asks `range_of`, to name the file
too.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import Field, dataclass, field, fields
from typing import Any

from vltrain.errors import InputError
from vltrain.files.strict_json import is_sequence

RANGE, REGISTRY = "range", "registry"
MOST_STEPS = 2**31 - 1
MOST_SIZE = 2**20  # of a width, a rank, a batch: more is a typing error
MOST_SEED = 2**63 - 1
MOST_TOKENS = 2**24  # of a pack
MOST_PIXELS = 2**33
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, ends included unless open; with `or_zero`, 0 beside them. `hint`: how to say
    what is out of it."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False
    hint: str = ""

    def holds(self, value: Any) -> bool:
        """Whether `value`, or each number of a list, is in the range. null is: whether a setting may be null is its
        type's matter."""
        if value is None:
            return True
        if is_sequence(value):
            return all(map(self.holds, value))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or (self.or_zero and value == 0)

    def __str__(self) -> str:
        zero = "0 or " if self.or_zero else ""
        low, high = (int(end) if end == int(end) else end for end in (self.low, self.high))
        return (
            f"{zero}a number in {'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}{self.hint}"
        )

    def require(self, key: str, value: Any) -> None:
        """Raises InputError naming `key` unless the range holds `value`."""
        if not self.holds(value):
            found = list(value) if is_sequence(value) else value
            raise InputError(f"{key}: found {found!r}, expected {self}")


def number(
    default: Any,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
    or_zero: bool = False,
    hint: str = "",
) -> Any:
    """A dataclass field of that default, a number (or numbers, or null) in the range."""
    return field(default=default, metadata={RANGE: Range(low, high, open_low, open_high, or_zero, hint)})


def named(registry: str, default: Any, *, beside: tuple[str, ...] = ()) -> Any:
    """A dataclass field of that default, a name of a table (`MODULE.NAME`) or one of `beside`; whoever reads the table
    checks it."""
    return field(default=default, metadata={REGISTRY: Registry(registry, beside)})


@dataclass(frozen=True)
class Registry:
    """Where the names are that a setting may have. Read only where they are to be shown: the table's module may need
    seconds to load."""

    place: str
    beside: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        module, _, name = self.place.rpartition(".")
        return (*self.beside, *getattr(importlib.import_module(module), name))


def registry_of(entry: Field[Any]) -> Registry | None:
    """The table that a field's names are of, if it says so."""
    return entry.metadata.get(REGISTRY)


def range_of(entry: Field[Any]) -> Range | None:
    """The range that a field declares, if it does."""
    return entry.metadata.get(RANGE)


def check_ranges(section: Any, key: str) -> None:
    """Raises InputError for a number of `section`, a dataclass whose settings stand below `key`, that is out of its
    range."""
    for entry in fields(section):
        allowed = range_of(entry)
        if allowed is not None:
            allowed.require(f"{key}.{entry.name}", getattr(section, entry.name))
