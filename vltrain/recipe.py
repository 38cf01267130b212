"""Recipes: strict YAML files of the keys that `vltrain.config` declares, read into dotted keys and written back whole.

Strict means that a recipe can only say what it seems to say: unknown and repeated keys fail, scalars follow YAML 1.2 (`1e-3` is
a number; `no` and `on` are words), types are those of the dataclasses with no conversion, and anchors, aliases, tags and very deep
or very large files are refused, so that a small file cannot grow into a large one. The price: YAML's sharing of sections
between places is not available; overrides on the command line are.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from vltrain.config import Config
from vltrain.errors import InputError, nearest

MAX_RECIPE_BYTES = 1 << 20
MAX_DEPTH = 20


@dataclass(frozen=True)
class Key:
    """One declared setting: its type annotation and the value it has when nobody sets it."""

    annotation: Any
    default: Any


@cache
def known_keys() -> dict[str, Key]:
    """Every setting by its dotted name (`model.adapter.dim`), in the order of declaration."""
    return dict(_walk(Config(), ""))


@cache
def known_sections() -> frozenset[str]:
    """Every dotted name that holds settings and is none itself (`model`, `model.adapter`, ...)."""
    return frozenset(key[:dot] for key in known_keys() for dot in range(len(key)) if key[dot] == ".")


def _walk(section: Any, prefix: str) -> Iterator[tuple[str, Key]]:
    annotations = get_type_hints(type(section))
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", Key(annotations[entry.name], value)


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
    names = {type(None): "null", bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    return names.get(annotation, "a mapping of names to plain values")


def check_type(value: Any, annotation: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type, and the value as the dataclass holds it (lists as tuples, whole numbers as floats)."""
    origin = get_origin(annotation)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in get_args(annotation)), value
    if origin in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := check_type(value, part))[0]), (False, value))
    if origin is tuple:
        parts = get_args(annotation)
        if parts[-1] is ... and isinstance(value, (list, tuple)):
            parts = parts[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            return False, value
        checked = [check_type(item, part) for item, part in zip(value, parts)]
        return all(fits for fits, _ in checked), tuple(item for _, item in checked)
    if origin is dict:
        return isinstance(value, dict) and _is_plain(value), value
    if annotation is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        return fits, float(value) if fits else value
    return type(value) is annotation, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def checked_value(key: str, value: Any, where: str) -> Any:
    """`value` as the setting `key` holds it. Raises InputError naming `where`, key, found and expected."""
    annotation = known_keys()[key].annotation
    fits, value = check_type(value, annotation)
    if not fits:
        raise InputError(f"{where}: {key}: found {'null' if value is None else repr(value)}, expected {describe_type(annotation)}")
    return value


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of the recipe at `path` by dotted name, types checked. Raises InputError naming the file and the key."""
    content = load_yaml(path)
    given: dict[str, Any] = {}
    if content is not None:  # an empty file changes nothing
        _collect(content, "", str(path), given)
    return given


def _collect(content: Any, prefix: str, where: str, given: dict[str, Any]) -> None:
    if not isinstance(content, dict):
        place = prefix.rstrip(".") or "the whole file"
        raise InputError(f"{where}: {place}: found {'null' if content is None else repr(content)}, expected a section with keys of its own")
    for name, value in content.items():
        key = f"{prefix}{name}"
        if "." in str(name) and (key in known_keys() or key in known_sections()):
            raise InputError(f"{where}: found the dotted key '{key}', expected nested sections ({key.replace('.', ': {')}: ...)")
        if key in known_sections():
            _collect(value, f"{key}.", where, given)
        elif key in known_keys():
            given[key] = checked_value(key, value, where)
        else:
            raise InputError(f"{where}: unknown key '{key}', {suggest(key)}")


def build_config(given: dict[str, Any]) -> Config:
    """The defaults of `Config` with the settings in `given` (dotted name -> checked value) put over them."""
    return _build(Config(), given, "")


def _build(section: Any, given: dict[str, Any], prefix: str) -> Any:
    values = {}
    for entry in fields(section):
        value = getattr(section, entry.name)
        key = f"{prefix}{entry.name}"
        values[entry.name] = _build(value, given, f"{key}.") if is_dataclass(value) else given.get(key, value)
    return type(section)(**values)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `read_recipe` reads back to an equal one."""
    return yaml.dump(_plain(asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_yaml(path: Path) -> Any:
    """The one document in the YAML file at `path`, read strictly (see the module). Raises InputError naming file and line."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); expected a YAML recipe") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise InputError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; expected a YAML recipe")
    try:
        _refuse_expansion(text, path)
        return load_text(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: {error.problem or error.context}; expected YAML") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}; expected YAML") from None


def load_text(text: str) -> Any:
    """The one YAML document in `text`, with the scalars of YAML 1.2. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def _refuse_expansion(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(f"{path}, line {line}: found an anchor or alias (& or *), expected every value written out")
        if getattr(event, "tag", None):
            raise InputError(f"{path}, line {line}: found the tag '{event.tag}', expected plain values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"{path}, line {line}: nested deeper than {MAX_DEPTH} levels")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars and without repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "found a key that is no plain word", name.start_mark)
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found the key '{name.value}' a second time", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that `_Loader` would read as something else, and never writes an alias."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


# The core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema); tried in this order.
_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("tag:yaml.org,2002:float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 100:
        raise yaml.constructor.ConstructorError(None, None, "found a number of more than 100 digits", node.start_mark)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)  # PyYAML's reads 010 as octal, 1:30 as 90
