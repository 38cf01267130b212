"""YAML that can only say what it seems to say.

Scalars follow YAML 1.2 (`1e-3` is a number; `no` and `on` are words), repeated keys fail, and anchors, aliases, tags
and very deep or very large files are refused, so that a small file cannot grow into a large one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from vltrain.errors import InputError
from vltrain.files.strict_json import require_plain_file

MAX_RECIPE_BYTES = 1 << 20
MAX_DEPTH = 20


def load_yaml(path: Path) -> Any:
    """The one document in the YAML file at `path`, read strictly (see the module). Raises InputError naming file and
    line."""
    require_plain_file(path, "a YAML recipe")
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


def is_mapping(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether a value of YAML is a mapping; its keys may be any scalars."""
    return isinstance(value, dict)


def load_text(text: str) -> Any:
    """The one YAML document in `text`, with the scalars of YAML 1.2. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump_text(content: Any) -> str:
    """`content` as YAML that `load_text` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _refuse_expansion(text: str, path: Path) -> None:
    depth = 0
    reader: Any = yaml  # whose stubs leave the types of events open
    for event in reader.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(
                f"{path}, line {line}: found an anchor or alias (& or *), expected every value written out"
            )
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
                raise yaml.constructor.ConstructorError(
                    None, None, "found a key that is not a plain string", name.start_mark
                )
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key '{name.value}' a second time", name.start_mark
                )
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
_CLASSES: tuple[Any, ...] = (_Loader, _Dumper)  # whose stubs leave the arguments open
for _tag, _pattern, _first in _SCALARS:
    for _class in _CLASSES:
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 100:
        raise yaml.constructor.ConstructorError(None, None, "found a number of more than 100 digits", node.start_mark)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)  # PyYAML's reads 010 as octal, 1:30 as 90
