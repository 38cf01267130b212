"""Recipes: strict YAML files of the keys that `vltrain.config` declares, read into dotted keys and written back whole.

Strict means that a recipe can only say what it seems to say: unknown keys fail, types are those of the dataclasses with no
conversion, and the YAML itself is read strictly (`vltrain.strict_yaml`). Recipes that have much in common are written once: a
recipe may stand on another, and a table holds several:

    base: OTHER.yaml      (seen from this file's folder; or a name of launch/recipes) its settings hold where this file is silent; keys of a mapping join its mapping
    output: runs/NAME     with a base, always this file's own
    rows:                 makes the file a table: a row's settings stand on those of the file. `FILE#ROW` names a row wherever a recipe is
      NAME: {...}         named; its run goes into the table's output, below its own name. Or a file of only `rows`, which tables share
    ablation: {...}       how `vltrain ablate` runs the rows, see `Ablation`
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

from vltrain.config import Config
from vltrain.errors import InputError, nearest
from vltrain.ranges import MOST_STEPS, Range, check_ranges, number, range_of
from vltrain.shipped import find_recipe
from vltrain.strict_yaml import dump_text, load_yaml

BASE, ROWS, ABLATION = "base", "rows", "ablation"  # keys of a recipe's file beside the settings
ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # it names a folder


@dataclass(frozen=True)
class Key:
    """One declared setting: its type annotation, the value it has when nobody sets it, and of numbers the range."""

    annotation: Any
    default: Any
    range: Range | None = None


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
            yield f"{prefix}{entry.name}", Key(annotations[entry.name], value, range_of(entry))


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
    names = {type(None): "null", bool: "true or false", int: "a whole number", float: "a finite number", str: "a text that is not empty"}
    return names.get(annotation, "a mapping of names to plain values (texts, finite numbers, true, false, null, lists and mappings)")


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
    return type(value) is annotation and (annotation is not str or bool(value.strip())), value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def checked_value(key: str, value: Any, where: str) -> Any:
    """`value` as the setting `key` holds it. Raises InputError naming `where`, key, found and expected."""
    annotation = known_keys()[key].annotation
    fits, value = check_type(value, annotation)
    if not fits:
        raise InputError(f"{where}: {key}: found {'null' if value is None else repr(value)}, expected {describe_type(annotation)}")
    allowed = known_keys()[key].range
    if allowed is not None:
        allowed.require(f"{where}: {key}", value)
    return value


@dataclass(kw_only=True)
class Ablation:
    """How the rows of a table are run: the keys of its section `ablation`."""

    program: str = "train_mmt"
    """Which program of launch/ trains a row."""
    evaluate: str = "evaluate"
    """Which program of launch/ evaluates it."""
    split: str | None = None
    """The split that is answered; null: each row's data.test_split."""
    max_samples: int | None = number(None, 1, MOST_STEPS)
    """Questions that are answered, evenly spaced over the split; null: all."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A recipe with rows. `rows`: what each row sets itself, by dotted name; `settings`: what holds for all of them."""

    path: Path
    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    ablation: Ablation

    def recipe_of(self, row: str) -> Path:
        """What `--recipe` takes for a row."""
        return Path(f"{self.path}#{row}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of the recipe at `path` (or of the row `FILE#ROW`) by dotted name, types checked, its bases' included.

    Raises: InputError naming the file, the row and the key; for bases that lead back to themselves; for a table without a row's name.
    """
    return _read(path, ())


def read_table(path: Path) -> Table:
    """The table at `path`. Raises InputError as `read_recipe`, and for a recipe that has no rows."""
    content = _open(path)
    if not isinstance(content, dict) or ROWS not in content:
        raise InputError(f"{path}: no '{ROWS}' in it, expected a table: a recipe with {ROWS}: {{NAME: {{settings}}, ...}}")
    return _table(path, content, ())


def _open(path: Path) -> Any:
    content = load_yaml(path)
    return {} if content is None else content  # an empty file changes nothing


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """`above`: the recipes that stand on this one, the first that was named first."""
    file, row = _split_row(path)
    here = Path(f"{file.resolve()}#{row}") if row is not None else file.resolve()
    if here in above:
        chain = " -> ".join(place.name for place in (*above[above.index(here) :], here))
        raise InputError(f"{above[-1]}: {BASE}: leads back to itself ({chain}); expected a recipe that stands on its own feet in the end")
    content = _open(file)
    is_table = isinstance(content, dict) and ROWS in content
    if row is None and not is_table:
        return _settings(file, content, str(file), (*above, here))
    if not is_table:
        raise InputError(f"{path}: {file} has no '{ROWS}', so no row '{row}'; name the file alone")
    table = _table(file, content, (*above, here))
    if row is None:
        raise InputError(f"{file}: found a table, expected {file}#ROW for one of its rows: {', '.join(table.rows)} (all: vltrain ablate)")
    if row not in table.rows:
        raise InputError(f"{path}: no row '{row}' in {file}, {nearest(row, table.rows)}")
    return _overlay(table.settings, {**table.rows[row], "output": str(Path(table.settings["output"]) / row)})


def _split_row(path: Path) -> tuple[Path, str | None]:
    file, mark, row = str(path).rpartition("#")
    return (path, None) if not mark or path.exists() else (Path(file), row)


def _settings(path: Path, content: Any, where: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a file's content says over what its base says."""
    own: dict[str, Any] = {}
    if not isinstance(content, dict) or BASE not in content:
        _collect(content, "", where, own)
        return own
    base = content[BASE]
    if not isinstance(base, str):
        raise InputError(f"{where}: {BASE}: found {'null' if base is None else repr(base)}, expected another recipe's file")
    _collect({name: value for name, value in content.items() if name != BASE}, "", where, own)
    if "output" not in own:
        raise InputError(f"{where}: output: found nothing, expected this recipe's own folder; a base's holds the base's run")
    return _overlay(_read(find_recipe(base, f"{where}: {BASE}", path.parent), above), own)


def _overlay(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`; a mapping's keys join the base's mapping."""
    return {**base, **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in own.items()}}


def _table(path: Path, content: dict[Any, Any], above: tuple[Path, ...]) -> Table:
    found, where = content[ROWS], str(path)
    if isinstance(found, str):
        where = str(path.parent / found)
        listed = _open(path.parent / found)
        if not isinstance(listed, dict) or listed.keys() != {ROWS}:
            told = f"keys {', '.join(map(str, listed))}" if isinstance(listed, dict) else repr(listed)
            raise InputError(f"{where}: found {told}, expected {ROWS}: {{NAME: {{settings}}, ...}} and nothing else")
        found = listed[ROWS]
    if not isinstance(found, dict) or not found:
        raise InputError(f"{where}: {ROWS}: found {'null' if found is None else repr(found)}, expected a mapping of row names to settings")
    settings = _settings(path, {name: value for name, value in content.items() if name not in (ROWS, ABLATION)}, where, above)
    if "output" not in settings:
        raise InputError(f"{where}: output: found nothing, expected the folder for the runs of all rows")
    rows: dict[str, dict[str, Any]] = {}
    for name, row in found.items():
        if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
            raise InputError(f"{where}: {ROWS}: found the name {name!r}, expected a folder's name of letters, digits, '_', '-' and '.'")
        rows[name] = {}
        _collect(row, "", f"{where}: row '{name}'", rows[name])
        if "output" in rows[name]:
            raise InputError(f"{where}: row '{name}': output: found a folder, expected none: its run goes into {settings['output']}/{name}")
    return Table(path=path, settings=settings, rows=rows, ablation=_ablation(content.get(ABLATION, {}), where))


def _ablation(content: Any, where: str) -> Ablation:
    declared = get_type_hints(Ablation)
    if not isinstance(content, dict):
        raise InputError(f"{where}: {ABLATION}: found {content!r}, expected a section with keys of its own")
    for name, value in content.items():
        if name not in declared:
            raise InputError(f"{where}: unknown key '{ABLATION}.{name}', {nearest(str(name), declared)}")
        if not check_type(value, declared[name])[0]:
            found = "null" if value is None else repr(value)
            raise InputError(f"{where}: {ABLATION}.{name}: found {found}, expected {describe_type(declared[name])}")
    ablation = Ablation(**content)
    check_ranges(ablation, f"{where}: {ABLATION}")
    return ablation


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
    return dump_text(_plain(asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
