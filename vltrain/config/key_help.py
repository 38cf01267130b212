"""The text of `--help` of programs that take settings: options, then every key of a recipe once, by section, in 100
columns.

    --model.tune {adapters,neck,full}  [adapters]
        what it means

The meaning is the docstring where the key is declared, the choices are its type's or those of the table that its names
are of.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from vltrain.config.keys import Key, describe_type, known_keys
from vltrain.config.strict_yaml import is_mapping
from vltrain.files.strict_json import is_sequence

WIDTH = 100
KEYS = (
    "Keys of a recipe, a YAML file of nested sections, which the command line overrides: --KEY what it takes "
    "[default]. A file may also say base, rows, stages "
    "and ablation (vltrain/config/recipe.py)."
)


def describe_value(value: Any) -> str:
    """A default as a recipe spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if is_sequence(value):
        return f"[{', '.join(map(describe_value, value))}]"
    if is_mapping(value):
        return "{" + ", ".join(f"{name}: {describe_value(one)}" for name, one in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def takes(key: Key) -> str:
    """What stands behind `--KEY`: its choices, or what kind of value it is."""
    annotation = key.annotation
    choices = ",".join(key.choices())
    if get_origin(annotation) is tuple:
        if choices:
            return f"[{{{choices}}},...]"
        return "[X,...]" if get_args(annotation)[-1] is ... else f"[{','.join('X' * len(get_args(annotation)))}]"
    if choices:
        return f"{{{choices}}}"
    if get_origin(annotation) is dict:
        return "{KEY: VALUE, ...}"
    words = {"a whole number": "N", "a finite number": "X", "a text that is not empty": "TEXT"}
    return "|".join(words.get(word, word) for word in describe_type(annotation).split(" or "))


def render(
    usage: str,
    description: str,
    options: Sequence[tuple[str, str, str | None]],
    meanings: Mapping[str, str],
    sections: Mapping[str, str],
    examples: Iterable[str] = (),
) -> str:
    """The whole text.

    Args:
        options: of the program itself: (name and what it takes, meaning, default or None).
        meanings: of each key.
        sections: title of each section by its dotted name.
    """
    lines = [f"usage: {usage}", "", *_wrapped(description, 0)]
    if examples:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    lines += ["", "options:"]
    for name, meaning, default in options:
        lines += _entry(f"--{name}" + (f"  [{default}]" if default else ""), meaning)
    lines += ["", *_wrapped(KEYS, 0)]
    by_section: dict[str, list[str]] = {}
    for name in known_keys():
        by_section.setdefault(name.rpartition(".")[0], []).append(name)
    for section, names in by_section.items():
        lines += ["", *_wrapped(f"{section}: {sections[section]}" if section else sections[section], 0)]
        for name in names:
            key = known_keys()[name]
            allowed = f" ({key.range})" if key.range is not None else ""
            lines += _entry(f"--{name} {takes(key)}  [{describe_value(key.default)}]", meanings.get(name, "") + allowed)
    return "\n".join(lines) + "\n"


def _entry(head: str, meaning: str) -> list[str]:
    lines: list[str] = []
    line = "  "
    for piece in re.split(r"(?<=[, ])", head):  # a long list of choices may be broken behind a comma
        if len(line) + len(piece.rstrip()) > WIDTH:
            lines, line = [*lines, line.rstrip()], " " * 6
        line += piece
    return [*lines, line, *_wrapped(meaning, 6)]


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
