"""What the file of a table says beside settings: how its rows are run, figures that were published, and rows that are
files of answers.

    ablation: {...}       how `vltrain ablate` runs the rows, see `Ablation`
    published:            figures of others, in per cent, which are shown beside one's own
      source: TEXT        where they stand
      rows: {ROW: {COLUMN: NUMBER}}
    predictions:          rows without a model: files of answers, see `vltrain.evaluate.prediction_files`
      data: PLACE         whose questions they answer: ScienceQA's folder, or samples
      scorer: NAME        of samples; left out: scienceqa
      letters: true       "B" and "The answer is (B)." are choices
      files: {ROW: FILE}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from vltrain.config.keys import check_type, describe_type
from vltrain.config.ranges import MOST_STEPS, check_ranges, number
from vltrain.config.strict_yaml import is_mapping
from vltrain.errors import InputError, nearest

ABLATION, PUBLISHED, PREDICTIONS = "ablation", "published", "predictions"


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
    """Questions that are answered, spread over the split as `eval.spread` says; null: all."""
    against: str | None = None
    """The row that the others are tested against, or best; null: the first."""
    packs: int | None = number(None, 1, MOST_STEPS)
    """Packs of all training data, by which `--plan` tells hours where they are not on this machine."""
    untuned: tuple[str, ...] = ()
    """Rows that answer as they are before tuning: nothing of them is trained, no training data are wanted."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """`figures`: row -> column -> per cent, where it is told; `columns`: of all rows, in the order of the first that
    has them; `source`: where they stand."""

    source: str
    figures: dict[str, dict[str, float]]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of all rows, in the order in which they come first."""
        return tuple(dict.fromkeys(column for row in self.figures.values() for column in row))


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Rows that are files of answers: see the module."""

    data: Path
    scorer: str | None
    letters: bool
    files: dict[str, Path]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A recipe with rows. `rows`: what each row sets itself, by dotted name; `bases`: the recipe that a row stands on,
    where it is not the table's; `settings`: what holds for all of them."""

    path: Path
    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    ablation: Ablation
    bases: dict[str, str] = field(default_factory=dict)
    published: Published | None = None
    predictions: Predictions | None = None

    def recipe_of(self, row: str) -> Path:
        """What `--recipe` takes for a row."""
        return Path(f"{self.path}#{row}")

    @property
    def files(self) -> dict[str, Path]:
        """The rows that are files of answers."""
        return self.predictions.files if self.predictions else {}

    @property
    def lines(self) -> tuple[str, ...]:
        """All rows, files of answers included, in the order of the published ones, then of the others."""
        return tuple(dict.fromkeys((*(self.published.figures if self.published else ()), *self.files, *self.rows)))


def read_ablation(content: Any, where: str, rows: Collection[str]) -> Ablation:
    """The section `ablation`. `rows`: those with a model. Raises InputError naming `where` (the file) and the key."""
    declared, settings = get_type_hints(Ablation), dict[str, Any]()
    for name, value in _section(content, where, ABLATION, declared).items():
        fits, settings[name] = check_type(value, declared[name])
        if not fits:
            found = "null" if value is None else repr(value)
            raise InputError(f"{where}: {ABLATION}.{name}: found {found}, expected {describe_type(declared[name])}")
    ablation = Ablation(**settings)
    check_ranges(ablation, f"{where}: {ABLATION}")
    for row in ablation.untuned:
        if row not in rows:
            raise InputError(f"{where}: {ABLATION}.untuned: no row '{row}' with a model, {nearest(row, rows)}")
    return ablation


def read_published(content: Any, where: str, rows: Collection[str]) -> Published:
    """The section `published`. `rows`: those that the table has. Raises InputError as `read_ablation`, and for a row
    that the table does not have."""
    section = _section(content, where, PUBLISHED, ("source", "rows"))
    source, listed = section.get("source"), section.get("rows")
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"{where}: {PUBLISHED}.source: found {source!r}, expected a text: where the figures stand")
    figures: dict[str, dict[str, float]] = {}
    for row, columns in _mapping(listed, f"{where}: {PUBLISHED}.rows").items():
        if row not in rows:
            raise InputError(f"{where}: {PUBLISHED}.rows: no row '{row}' in the table, {nearest(str(row), rows)}")
        figures[row] = {}
        for column, value in _mapping(columns, f"{where}: {PUBLISHED}.rows.{row}").items():
            if type(value) not in (int, float) or not 0 <= value <= 100:
                found = f"{where}: {PUBLISHED}.rows.{row}.{column}: found {value!r}"
                raise InputError(f"{found}, expected per cent, from 0 to 100; leave out what is not told")
            figures[row][str(column)] = float(value)
    return Published(source=source, figures=figures)


def read_predictions(content: Any, where: str, rows: Collection[str]) -> Predictions:
    """The section `predictions`. `rows`: those that are trained. Raises InputError as `read_ablation`."""
    section = _section(content, where, PREDICTIONS, ("data", "scorer", "letters", "files"))
    for key, kind in (("data", str), ("scorer", (str, type(None))), ("letters", bool)):
        value = section.get(key, False if key == "letters" else None)
        if not isinstance(value, kind):
            expected = "true or false" if key == "letters" else "a text"
            raise InputError(f"{where}: {PREDICTIONS}.{key}: found {value!r}, expected {expected}")
    files: dict[str, Path] = {}
    for row, file in _mapping(section.get("files"), f"{where}: {PREDICTIONS}.files").items():
        if row in rows:
            raise InputError(f"{where}: {PREDICTIONS}.files.{row}: found a file, but row '{row}' is trained; leave one")
        if not isinstance(file, str) or not file.strip():
            raise InputError(f"{where}: {PREDICTIONS}.files.{row}: found {file!r}, expected a file of answers")
        files[str(row)] = Path(file)
    scorer, letters = section.get("scorer"), section.get("letters", False)
    return Predictions(data=Path(section["data"]), scorer=scorer, letters=letters, files=files)


def _section(content: Any, where: str, name: str, keys: Collection[str]) -> Mapping[str, Any]:
    if not is_mapping(content):
        raise InputError(f"{where}: {name}: found {content!r}, expected a section with keys of its own")
    for key in content:
        if key not in keys:
            raise InputError(f"{where}: unknown key '{name}.{key}', {nearest(str(key), keys)}")
    return content


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not is_mapping(content) or not content:
        found = "null" if content is None else repr(content)
        raise InputError(f"{where}: found {found}, expected a mapping of names, one or more")
    return content
