"""Recipes: strict YAML files of the keys that `vltrain.config.schema` declares, read into dotted keys and written back
whole.

Strict means that a recipe can only say what it seems to say: unknown keys fail, types are those of the dataclasses with
no conversion, and the YAML itself is read strictly (`vltrain.config.strict_yaml`). Recipes that have much in common are
written once: a recipe may stand on another, and a table holds several:

    base: OTHER.yaml      (seen from this file's folder; or a name of launch/recipes) its settings hold where this file
                          is silent; keys of a mapping join its mapping
    output: runs/NAME     with a base, always this file's own
    rows:                 makes the file a table: a row's settings stand on those of the file, or, in a table without a
                          base, on a `base` of its own. `FILE#ROW` names a row wherever a recipe is
      NAME: {...}         named; its run goes into the table's output, below its own name. Or a file of only `rows`,
                          which tables share
    stages:               makes the file a run in stages, one after another, each beginning with the weights of the one
                          before (LLaVA's way: neck first).
      NAME: {...}         a stage's settings stand on those of the file. Its run goes into the output, as 1-NAME,
                          2-NAME, ...; `FILE#NAME` names it alone
    ablation, published, predictions: of a table, see `vltrain.config.tables`
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from vltrain.config.keys import (
    checked_value,
    default_of,
    keys_of,
    known_keys,
    known_sections,
    suggest,
)
from vltrain.config.mixture import joined_mapping, require_mixture
from vltrain.config.model.architectures import DEFAULT, section_of
from vltrain.config.model.architectures import KEY as ARCHITECTURE
from vltrain.config.model.base import ModelConfig
from vltrain.config.older_runs import is_default
from vltrain.config.schema import Config
from vltrain.config.strict_yaml import dump_text, is_mapping, load_yaml
from vltrain.config.tables import (
    ABLATION,
    PREDICTIONS,
    PUBLISHED,
    Table,
    read_ablation,
    read_predictions,
    read_published,
)
from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import is_sequence
from vltrain.shipped import find_recipe

BASE, ROWS, STAGES = "base", "rows", "stages"  # keys of a recipe's file beside the settings
OF_TABLES = (ABLATION, PUBLISHED, PREDICTIONS)
INIT_FROM = "train.init_from"
RECIPE = "config.yaml"  # in a run's folder: the resolved one, which every run writes
RUN = "run.json"  # beside it: what the run was made of, see `vltrain.train.run.provenance`
ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # it names a folder


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A recipe in stages. `stages`: what each stage sets itself, by dotted name; `settings`: what holds for all of
    them."""

    path: Path
    settings: dict[str, Any]
    stages: dict[str, dict[str, Any]]

    def recipe_of(self, stage: str) -> Path:
        """What `--recipe` takes for a stage."""
        return Path(f"{self.path}#{stage}")

    def folder_of(self, stage: str, output: str | None = None) -> str:
        """Where its run goes. `output`: of the whole, where it is not the recipe's."""
        return str(Path(output or self.settings["output"]) / f"{list(self.stages).index(stage) + 1}-{stage}")

    def before(self, stage: str) -> str | None:
        """The stage that it begins with the weights of; None for the first."""
        names = list(self.stages)
        return names[names.index(stage) - 1] if stage != names[0] else None

    def whole(self, stage: str) -> dict[str, Any]:
        """All settings of a stage, by dotted name."""
        before = self.before(stage)
        begins = {INIT_FROM: self.folder_of(before)} if before is not None else {}
        return _overlay(self.settings, {**self.stages[stage], "output": self.folder_of(stage), **begins})


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of the recipe at `path` (or of the row `FILE#ROW`) by dotted name, types checked, its bases'
    included.

    Raises: InputError naming the file, the row and the key; for bases that lead back to themselves; for a table without
    a row's name.
    """
    return _read(path, ())


def has_rows(path: Path) -> bool:
    """Whether the recipe at `path` is a whole table. Raises InputError as `read_recipe`."""
    file, row = _split_row(path)
    content = _open(file) if row is None else None
    return is_mapping(content) and ROWS in content


def read_table(path: Path) -> Table:
    """The table at `path`. Raises InputError as `read_recipe`, and for a recipe that has no rows."""
    content = _open(path)
    if not is_mapping(content) or ROWS not in content:
        raise InputError(
            f"{path}: no '{ROWS}' in it, expected a table: a recipe with {ROWS}: {{NAME: {{settings}}, ...}}"
        )
    return _table(path, content, ())


def read_stages(path: Path) -> Stages | None:
    """The recipe in stages at `path`; None for another one, and for one stage alone (`FILE#STAGE`). Raises InputError
    as `read_recipe`."""
    file, part = _split_row(path)
    content = _open(file) if part is None else None
    return _stages(file, content, ()) if is_mapping(content) and STAGES in content else None


def require_tuned(path: Path) -> None:
    """Raises InputError for a row (`FILE#ROW`) that its table lists under `ablation.untuned`."""
    file, row = _split_row(path)
    if row is not None and has_rows(file) and row in read_table(file).ablation.untuned:
        raise InputError(
            f"{path}: '{row}' is listed under {ABLATION}.untuned: it answers as it is before tuning, and nothing of it "
            f"is trained; to have it answered: vltrain ablate {file} --only {row}"
        )


def own_settings(path: Path) -> dict[str, Any] | None:
    """Of `FILE#STAGE` what the stage itself sets; None for another recipe. Raises InputError as `read_recipe`."""
    file, part = _split_row(path)
    stages = read_stages(file) if part is not None else None
    return None if stages is None else stages.stages.get(part or "")


def _open(path: Path) -> Any:
    content = load_yaml(path)
    return {} if content is None else content  # an empty file changes nothing


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """`above`: the recipes that stand on this one, the first that was named first."""
    file, row = _split_row(path)
    here = Path(f"{file.resolve()}#{row}") if row is not None else file.resolve()
    if here in above:
        chain = " -> ".join(place.name for place in (*above[above.index(here) :], here))
        raise InputError(f"{above[-1]}: {BASE}: leads back to itself ({chain}); expected a chain of bases that ends")
    content = _open(file)
    if is_mapping(content) and STAGES in content:
        return _stage(path, row, _stages(file, content, (*above, here)))
    is_table = is_mapping(content) and ROWS in content
    if row is None and not is_table:
        return _settings(file, content, str(file), (*above, here))
    if not is_table:
        raise InputError(f"{path}: {file} has no '{ROWS}' or '{STAGES}', so no '{row}'; name the file alone")
    table = _table(file, content, (*above, here))
    if row is None:
        raise InputError(
            f"{file}: found a table, expected {file}#ROW for one of its rows: {', '.join(table.rows)} (all: "
            "vltrain ablate)"
        )
    if row in table.lines and row not in table.rows:
        raise InputError(f"{path}: row '{row}' is a file of answers, which no recipe trains; see vltrain ablate")
    if row not in table.rows:
        raise InputError(f"{path}: no row '{row}' in {file}, {nearest(row, table.rows)}")
    whole = _overlay(table.settings, {**table.rows[row], "output": str(Path(table.settings["output"]) / row)})
    if row not in table.bases:
        return whole
    below = find_recipe(table.bases[row], f"{file}: row '{row}': {BASE}", file.parent)
    return _overlay(_read(below, (*above, here)), whole)


def _stage(path: Path, name: str | None, stages: Stages) -> dict[str, Any]:
    if name is None:
        named = ", ".join(f"{stages.path}#{one}" for one in stages.stages)
        raise InputError(
            f"{path}: found a recipe in stages, expected one of them: {named} (all, one after another: vltrain train)"
        )
    if name not in stages.stages:
        raise InputError(f"{path}: no stage '{name}' in {stages.path}, {nearest(name, stages.stages)}")
    return stages.whole(name)


def _stages(path: Path, content: dict[Any, Any], above: tuple[Path, ...]) -> Stages:
    where = str(path)
    for key in (ROWS, *OF_TABLES):
        if key in content:
            raise InputError(f"{where}: found '{STAGES}' beside '{key}', expected one of the two")
    settings = _settings(path, {name: value for name, value in content.items() if name != STAGES}, where, above)
    if "output" not in settings:
        raise InputError(f"{where}: output: found nothing, expected the folder for the runs of all stages")
    own = _parts(content[STAGES], where, STAGES, "stage", f"{settings['output']}/NUMBER-NAME")
    if len(own) < 2:
        raise InputError(f"{where}: {STAGES}: found {len(own)}, expected two or more")
    for name in list(own)[1:]:
        if INIT_FROM in own[name]:
            raise InputError(
                f"{where}: stage '{name}': {INIT_FROM}: found {own[name][INIT_FROM]!r}, but it begins with the "
                "stage before; leave it out"
            )
    return Stages(path=path, settings=settings, stages=own)


def _parts(found: Any, where: str, section: str, kind: str, goes_into: str) -> dict[str, dict[str, Any]]:
    """The settings of each row or stage, by dotted name."""
    if not is_mapping(found) or not found:
        raise InputError(
            f"{where}: {section}: found {'null' if found is None else repr(found)}, expected a mapping of "
            f"{kind} names to settings"
        )
    parts: dict[str, dict[str, Any]] = {}
    for name, part in found.items():
        if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
            raise InputError(
                f"{where}: {section}: found the name {name!r}, expected a folder's name of letters, digits, "
                "'_', '-' and '.'"
            )
        parts[name] = {}
        _collect(part, "", f"{where}: {kind} '{name}'", parts[name])
        if "output" in parts[name]:
            raise InputError(
                f"{where}: {kind} '{name}': output: found a folder, expected none: its run goes into "
                f"{goes_into.replace('NAME', name)}"
            )
    return parts


def _split_row(path: Path) -> tuple[Path, str | None]:
    file, mark, row = str(path).rpartition("#")
    return (path, None) if not mark or path.exists() else (Path(file), row)


def _settings(path: Path, content: Any, where: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a file's content says over what its base says."""
    own: dict[str, Any] = {}
    if not is_mapping(content) or BASE not in content:
        _collect(content, "", where, own)
        return own
    base = content[BASE]
    if not isinstance(base, str):
        raise InputError(
            f"{where}: {BASE}: found {'null' if base is None else repr(base)}, expected another recipe's file"
        )
    _collect({name: value for name, value in content.items() if name != BASE}, "", where, own)
    if "output" not in own:
        raise InputError(
            f"{where}: output: found nothing, expected this recipe's own folder; a base's holds the base's run"
        )
    return _overlay(_read(find_recipe(base, f"{where}: {BASE}", path.parent), above), own)


def _overlay(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`; a mapping's keys join the base's mapping."""
    joined = {key: joined_mapping(key, base.get(key, {}), value) for key, value in own.items() if is_mapping(value)}
    return {**base, **own, **joined}


def _table(path: Path, content: dict[Any, Any], above: tuple[Path, ...]) -> Table:
    found, where = content[ROWS], str(path)
    if isinstance(found, str):
        where = str(path.parent / found)
        listed = _open(path.parent / found)
        if not is_mapping(listed) or listed.keys() != {ROWS}:
            told = f"keys {', '.join(map(str, listed))}" if is_mapping(listed) else repr(listed)
            raise InputError(f"{where}: found {told}, expected {ROWS}: {{NAME: {{settings}}, ...}} and nothing else")
        found = listed[ROWS]
    own = {name: value for name, value in content.items() if name not in (ROWS, *OF_TABLES)}
    settings = _settings(path, own, where, above)
    if "output" not in settings:
        raise InputError(f"{where}: output: found nothing, expected the folder for the runs of all rows")
    found, bases = _own_bases(found, where, BASE in content)
    rows = _parts(found, where, ROWS, "row", f"{settings['output']}/NAME")
    where, files, published = str(path), None, None
    if PREDICTIONS in content:
        files = read_predictions(content[PREDICTIONS], where, rows)
    if PUBLISHED in content:
        published = read_published(content[PUBLISHED], where, (*rows, *(files.files if files else ())))
    return Table(
        path=path,
        settings=settings,
        rows=rows,
        ablation=read_ablation(content.get(ABLATION, {}), where, rows),
        bases=bases,
        published=published,
        predictions=files,
    )


def _own_bases(found: Any, where: str, has_base: bool) -> tuple[Any, dict[str, str]]:
    """The rows without `base`, and the bases of those that have one."""
    bases: dict[str, str] = {}
    if not is_mapping(found):
        return found, bases
    for row, part in found.items():
        if not is_mapping(part) or BASE not in part:
            continue
        base = part[BASE]
        if has_base:
            raise InputError(f"{where}: row '{row}': {BASE}: found {base!r}, but the table has one; leave one out")
        if not isinstance(base, str):
            raise InputError(f"{where}: row '{row}': {BASE}: found {base!r}, expected another recipe's file")
        bases[str(row)] = base
    rest = {row: _without_base(part) for row, part in found.items()}
    return rest, bases


def _without_base(part: Any) -> Any:
    return {key: value for key, value in part.items() if key != BASE} if is_mapping(part) else part


def _collect(content: Any, prefix: str, where: str, given: dict[str, Any]) -> None:
    if not is_mapping(content):
        place = prefix.rstrip(".") or "the whole file"
        raise InputError(
            f"{where}: {place}: found {'null' if content is None else repr(content)}, expected a section with "
            "keys of its own"
        )
    for name, value in content.items():
        key = f"{prefix}{name}"
        if "." in str(name) and (key in known_keys() or key in known_sections()):
            raise InputError(
                f"{where}: found the dotted key '{key}', expected nested sections ({key.replace('.', ': {')}: ...)"
            )
        if key in known_sections():
            _collect(value, f"{key}.", where, given)
        elif key in known_keys():
            given[key] = checked_value(key, value, where)
        else:
            raise InputError(f"{where}: unknown key '{key}', {suggest(key)}")


def build_config(given: Mapping[str, Any]) -> Config:
    """The defaults of `Config`, and of the architecture's section, with the settings in `given` (dotted name -> checked
    value) put over them.

    Raises: InputError as `require_own`, and for settings that contradict each other.
    """
    require_own(given)
    config: Config = _build(Config, given, "")
    require_mixture(config)
    return config


def require_own(given: Mapping[str, Any], made: Collection[str] = ()) -> None:
    """Raises InputError for a setting of another architecture than the one that `given` names; but a default value
    passes, since resolved recipes of older versions name every key of every architecture.

    Args:
        made: keys of which no value passes.
    """
    name = given.get(ARCHITECTURE, DEFAULT)
    own = keys_of(name)
    for key, value in given.items():
        if key not in own and (key in made or not is_default(key, value)):
            owners = " and ".join(known_keys()[key].architectures)
            raise InputError(
                f"{key}: has no effect: it is of the architecture {owners}, and {ARCHITECTURE} is {name}; leave it "
                "out, or change the other"
            )


def _build(section: Any, given: Mapping[str, Any], prefix: str) -> Any:
    values = {}
    for entry in fields(section):
        value, key = default_of(section, entry), f"{prefix}{entry.name}"
        if isinstance(value, ModelConfig):
            value = section_of(given)
        values[entry.name] = _build(value, given, f"{key}.") if is_dataclass(value) else given.get(key, value)
    return (section if isinstance(section, type) else type(section))(**values)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `read_recipe` reads back to an equal one."""
    return dump_text(as_mapping(config))


def as_mapping(config: Config) -> dict[str, Any]:
    """The whole configuration as nested mappings and lists of plain values."""
    plain = _plain(asdict(config))
    for name in ("bits", "seed"):  # behind the architecture's own
        plain["model"][name] = plain["model"].pop(name)
    return plain


def _plain(value: Any) -> Any:
    if is_mapping(value):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if is_sequence(value) else value
