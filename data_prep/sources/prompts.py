"""Prompts of questions: a template with named places, and choices as `(a) x (b) y`.

A template is an option of a source, so it is checked before anything is read. `<image>` in a data set's own text is no
image: what goes into a turn is escaped (`vltrain.schema.escape_markers`), what goes into the metadata stays as it is.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from vltrain.errors import InputError

LETTERS = string.ascii_lowercase
MAX_CHOICES = len(LETTERS)


def check_template(source: str, option: str, template: str, places: Sequence[str]) -> None:
    """Raises InputError unless `template` has each of `places` as `{place}`, and nothing else in braces."""
    try:
        found = [
            (name, conversion, layout)
            for _, name, layout, conversion in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise InputError(f"source '{source}', option '{option}': found {template!r} ({error})") from None
    if sorted(name for name, _, _ in found) != sorted(places) or any(
        conversion or layout for _, conversion, layout in found
    ):
        expected = f"each of {', '.join(f'{{{place}}}' for place in places)} once" if places else "no braces"
        raise InputError(f"source '{source}', option '{option}': found {template!r}, expected {expected}")


def plain(text: str) -> str:
    """A data set's own text without the space around it."""
    return text.strip()


def lettered(choices: Sequence[str]) -> list[str]:
    """`(a) x`, `(b) y`, ...: what is listed in the prompt and what an answer is, not escaped; `(a)` alone for an empty
    choice."""
    return [f"({letter}) {plain(choice)}".rstrip() for letter, choice in zip(LETTERS, choices)]
