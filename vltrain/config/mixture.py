"""`data.mixture`: several sets of samples trained on together, each as a recipe of its own would name it.

    data:
      root: data/mine                  each set's own root is data/mine/NAME unless it says another
      mixture_by: tokens               what the weights are of
      mixture:
        shapes: {weight: 3, source: shapes, scorer: iconqa}
        chats:  {weight: 1, source: llava_json, input: chats.json, scorer: null}

A set is a name and the keys of `SetConfig`; whatever else the recipe says holds for all of them. Null in the place of
one that a base or a table names leaves it out. `sets_of` makes of a mixture a recipe for each set alone, so whoever
prepares, packs, checks or answers samples knows one set at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from vltrain.config.keys import check_type, describe_type
from vltrain.config.ranges import MOST_SIZE, check_ranges, number
from vltrain.config.schema import EASYVQA_ROOT, Config
from vltrain.config.strict_yaml import is_mapping
from vltrain.errors import InputError, nearest

KEY = "data.mixture"
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it names a folder
TAKEN = (
    "mean_of_sets",
    "mixed",
    "packed",
    "samples",
)  # folders of a root, and of a run's evaluations, that are no set's
ANSWERED_BY = ("method", "max_new_tokens")  # keys of `eval` that a set may have of its own, beside `scorer`


@dataclass(kw_only=True)
class SetConfig:
    """One set of a mixture. What is null is as the recipe says for all."""

    weight: float = number(1.0, 0, 1e9, open_low=True)
    """Its part, in the unit of `data.mixture_by`."""
    source: str | None = None
    input: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    root: str | None = None
    """null: a folder of its name in `data.root`."""
    train_packs: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    test_split: str | None = None
    scorer: str | None = None
    """What judges its answers; left out: `eval.scorer`; null: none, it is trained on and not evaluated."""
    method: Literal["generate", "rank"] | None = None
    """How it is answered; null: `eval.method`."""
    max_new_tokens: int | None = number(None, 1, MOST_SIZE)
    """Tokens that a generated answer may have; null: `eval.max_new_tokens`."""


def sets_of(config: Config) -> dict[str, Config]:
    """A recipe for each set alone, by name; {} of a recipe without a mixture."""
    return {name: _alone(config, name) for name in config.data.mixture}


def each_set(config: Config) -> dict[str, Config]:
    """The same; of a recipe without a mixture itself, under no name."""
    return sets_of(config) or {"": config}


@contextmanager
def of_set(name: str) -> Generator[None]:
    """Lets an InputError say which set of a mixture it is about; of a recipe without one, "", nothing."""
    try:
        yield
    except InputError as error:
        if not name:
            raise
        raise InputError(f"{KEY}.{name}: {error}") from None


def weights_of(config: Config) -> dict[str, float]:
    """Each set's weight, by name."""
    return {name: float(one.get("weight", 1.0)) for name, one in config.data.mixture.items()}


def _alone(config: Config, name: str) -> Config:
    given = dict(config.data.mixture[name])
    given.pop("weight", None)
    scorer, told = given.pop("scorer", config.eval.scorer), dict[str, Any]()
    for key in ANSWERED_BY:
        if (value := given.pop(key, None)) is not None:
            told[key] = value
    own: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    own = {"source": None, "input": None, "options": {}, "root": f"{config.data.root}/{name}", **own}
    data = dataclasses.replace(config.data, mixture={}, mixture_by="passes", when_a_set_ends="repeat", **own)
    return dataclasses.replace(config, data=data, eval=dataclasses.replace(config.eval, scorer=scorer, **told))


def joined_mapping(key: str, base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping of the setting `key` says over another one's: name by name, and by dots within a mapping that it
    has (`--model.instructblip.config.vision_config.hidden_size 64`); of a mixture its sets' keys too
    (`--data.mixture.SET.weight 3`); a set that is null is left out."""
    if key != KEY:
        return _deeper(base, own)
    left_out = {name for name, value in own.items() if value is None and name in base}
    return _joined(
        {name: one for name, one in base.items() if name not in left_out},
        {name: one for name, one in own.items() if name not in left_out},
    )


def _deeper(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for name, value in own.items():
        head, dot, rest = str(name).partition(".")
        below = joined.get(head)
        if dot and name not in base and is_mapping(below):
            joined[head] = _deeper(below, {rest: value})
        else:
            joined[name] = value
    return joined


def _joined(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for name, value in own.items():
        head, _, rest = str(name).partition(".")
        below = {rest: value} if rest else value
        before = joined.get(head)
        joined[head] = _joined(before if is_mapping(before) else {}, below) if is_mapping(below) else below
    return joined


def require_mixture(config: Config) -> None:
    """Raises InputError for a mixture that names something that no set has, or that cannot be."""
    for name, entry in config.data.mixture.items():
        _require_set(name, entry)
        _require_answers(name, entry, config)
    if not config.data.mixture:
        return
    if config.data.root == EASYVQA_ROOT:
        raise InputError(
            f"data.root: found {EASYVQA_ROOT!r}, which is kept for easyvqa; expected the mixture's own folder"
        )
    judged = [one.eval.scorer for one in sets_of(config).values()]
    named = [name for name, entry in config.data.mixture.items() if entry.get("scorer") is not None]
    if config.eval.scorer is None and named:
        raise InputError(
            f"{KEY}.{named[0]}.scorer: has no effect: eval.scorer = null evaluates nothing; leave it out, or change "
            "the other"
        )
    if config.eval.scorer is not None and not any(judged):
        raise InputError(f"{KEY}: no set has a scorer, so nothing is evaluated: say eval.scorer null")


def _require_set(name: Any, entry: Any) -> None:
    if not isinstance(name, str) or not SET_NAME.fullmatch(name) or name in TAKEN:
        raise InputError(
            f"{KEY}: found the name {name!r}, expected a folder's name of letters, digits, '_' and '-', other than "
            f"{', '.join(TAKEN)}"
        )
    key = f"{KEY}.{name}"
    if entry is None:
        raise InputError(
            f"{key}: found null, expected the set's keys: {_known()}; null leaves out a set of a base or a table, and "
            f"--{key} null one of the recipe"
        )
    if not is_mapping(entry):
        raise InputError(f"{key}: found {entry!r}, expected the set's keys: {_known()}")
    declared = get_type_hints(SetConfig)
    for one, value in entry.items():
        if one not in declared:
            raise InputError(f"{key}: unknown key '{one}', {nearest(str(one), declared)}")
        if not check_type(value, declared[one])[0]:
            found = "null" if value is None else repr(value)
            raise InputError(f"{key}.{one}: found {found}, expected {describe_type(declared[one])}")
    check_ranges(SetConfig(**entry), key)
    if entry.get("source") is None and entry.get("root") is None and entry.get("train_packs") is None:
        raise InputError(
            f"{key}: names no samples, expected source (a reader, or samples), root (of prepared ones) or train_packs"
        )


def _require_answers(name: str, entry: Mapping[str, Any], config: Config) -> None:
    """Raises InputError for what a set says of its answers and that changes none."""
    alone = _alone(config, name).eval
    for key in ANSWERED_BY:
        if entry.get(key) is not None and alone.scorer is None:
            raise InputError(f"{KEY}.{name}.{key}: has no effect: the set has no scorer, so nothing answers it")
    if entry.get("max_new_tokens") is not None and alone.method == "rank":
        raise InputError(f"{KEY}.{name}.max_new_tokens: has no effect: its method rank generates nothing")


def _known() -> str:
    return ", ".join(entry.name for entry in fields(SetConfig))
