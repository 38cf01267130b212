"""The settings that a recipe may make, by dotted name: type, default, range and choices of each, read off the
dataclasses of `vltrain.config.schema`."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vltrain.config.model.architectures import ARCHITECTURES
from vltrain.config.model.base import ModelConfig
from vltrain.config.ranges import Range, Registry, range_of, registry_of
from vltrain.config.schema import Config
from vltrain.config.strict_yaml import is_mapping
from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import is_list, is_sequence


@dataclass(frozen=True)
class Key:
    """One declared setting: its type annotation, the value it has when nobody sets it, of numbers the range, and the
    architectures that have it, () for what all have."""

    annotation: Any
    default: Any
    range: Range | None = None
    registry: Registry | None = None
    architectures: tuple[str, ...] = ()

    def choices(self) -> tuple[str, ...]:
        """What the setting, or each of its list, may be, as a recipe spells it; () where that cannot be listed."""
        if self.registry is not None:
            return (*self.registry.names(), *(("null",) if check_type(None, self.annotation)[0] else ()))
        return tuple(_choices(self.annotation))


def known_keys() -> dict[str, Key]:
    """Every setting of every architecture by its dotted name (`model.adapter.dim`), in the order of declaration."""
    return _known_keys(tuple(ARCHITECTURES.items()))


@cache
def _known_keys(architectures: tuple[tuple[str, type[ModelConfig]], ...]) -> dict[str, Key]:
    found = dict(_walk(Config, "", architectures))
    name_of_all = found["model.architecture"]
    found["model.architecture"] = replace(name_of_all, annotation=Literal[tuple(name for name, _ in architectures)])
    return found


def keys_of(name: str) -> dict[str, Key]:
    """The settings that a recipe of the architecture of that name may make."""
    return _keys_of(name, tuple(ARCHITECTURES.items()))


@cache
def _keys_of(name: str, architectures: tuple[tuple[str, type[ModelConfig]], ...]) -> dict[str, Key]:
    known = _known_keys(architectures)
    return {key: one for key, one in known.items() if not one.architectures or name in one.architectures}


def known_sections() -> frozenset[str]:
    """Every dotted name that holds settings and is none itself (`model`, `model.adapter`, ...)."""
    return _known_sections(tuple(ARCHITECTURES.items()))


@cache
def _known_sections(architectures: tuple[tuple[str, type[ModelConfig]], ...]) -> frozenset[str]:
    return frozenset(key[:dot] for key in _known_keys(architectures) for dot in range(len(key)) if key[dot] == ".")


def default_of(section: Any, entry: Field[Any]) -> Any:
    """What a field of a section (a dataclass, or one of its values) holds when nobody sets it."""
    if not isinstance(section, type):
        return getattr(section, entry.name)
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _walk(
    section: Any, prefix: str, architectures: tuple[tuple[str, type[ModelConfig]], ...], own: tuple[str, ...] = ()
) -> Iterator[tuple[str, Key]]:
    annotations = get_type_hints(section if isinstance(section, type) else type(section))
    for entry in fields(section):
        value, key = default_of(section, entry), f"{prefix}{entry.name}"
        if isinstance(value, ModelConfig):
            yield from _walk_union(f"{key}.", architectures)
        elif is_dataclass(value):
            yield from _walk(value, f"{key}.", architectures, own)
        else:
            yield key, Key(annotations[entry.name], value, range_of(entry), registry_of(entry), own)


def _walk_union(prefix: str, architectures: tuple[tuple[str, type[ModelConfig]], ...]) -> Iterator[tuple[str, Key]]:
    """The keys of every architecture's section; of those that several have the first one's."""
    common, seen = {f"{prefix}{entry.name}" for entry in fields(ModelConfig)}, set[str]()
    owners: dict[str, tuple[str, ...]] = {}
    walked = {name: dict(_walk(section, prefix, architectures)) for name, section in architectures}
    for name, keys in walked.items():
        for key in keys:
            owners[key] = (*owners.get(key, ()), name)
    for keys in walked.values():
        for key, known in keys.items():
            if key not in seen:
                seen.add(key)
                yield key, known if key in common else replace(known, architectures=owners[key])


def suggest(name: str) -> str:
    """A hint for the unknown dotted `name`: the same last word elsewhere, or the most similar known name."""
    section, _, word = name.rpartition(".")
    same_word = [key for key in known_keys() if key.rpartition(".")[2] == word]
    if same_word:
        hint = nearest(name, same_word)
        return hint if hint.startswith("did you mean") else f"did you mean {' or '.join(map(repr, same_word))}?"
    siblings = [key for key in known_keys() if key.rpartition(".")[0] == section]
    hint = nearest(name, [*known_keys(), *known_sections()])
    return hint if hint.startswith("did you mean") or not siblings else f"known: {', '.join(siblings)}"


def describe_type(annotation: Any) -> str:
    """An annotation in a user's words: `int or null`, `one of none, attention, ffn, both`."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        if get_args(annotation)[-1] is ...:
            return f"a list, each of it {describe_type(get_args(annotation)[0])}"
        return f"a list of {len(get_args(annotation))} numbers"
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text that is not empty",
    }
    return names.get(
        annotation, "a mapping of names to plain values (texts, finite numbers, true, false, null, lists and mappings)"
    )


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is tuple and get_args(annotation)[-1] is ...:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        parts = {part: _choices(part) for part in get_args(annotation) if part is not type(None)}
        listed = [choice for part in parts.values() for choice in part]
        return [*listed, "null"] if all(parts.values()) else []
    return []


def check_type(value: Any, annotation: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type, and the value as the dataclass holds it (lists as tuples, whole numbers as
    floats)."""
    origin = get_origin(annotation)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in get_args(annotation)), value
    if origin in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := check_type(value, part))[0]), (False, value))
    if origin is tuple:
        parts = get_args(annotation)
        if parts[-1] is ... and is_sequence(value):
            parts = parts[:1] * len(value)
        if not is_sequence(value) or len(value) != len(parts):
            return False, value
        checked = [check_type(item, part) for item, part in zip(value, parts)]
        return all(fits for fits, _ in checked), tuple(item for _, item in checked)
    if origin is dict:
        return is_mapping(value) and _is_plain(value), value
    if annotation is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        return fits, float(value) if fits else value
    return type(value) is annotation and (annotation is not str or bool(value.strip())), value


def _is_plain(value: Any) -> bool:
    if is_mapping(value):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if is_list(value):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def checked_value(key: str, value: Any, where: str) -> Any:
    """`value` as the setting `key` holds it. Raises InputError naming `where`, key, found and expected."""
    annotation = known_keys()[key].annotation
    fits, value = check_type(value, annotation)
    if not fits:
        raise InputError(
            f"{where}: {key}: found {'null' if value is None else repr(value)}, expected {describe_type(annotation)}"
        )
    allowed = known_keys()[key].range
    if allowed is not None:
        allowed.require(f"{where}: {key}", value)
    return value
