"""The settings of a run: a recipe, then the command line, checked before anything is built.

    load_settings(sys.argv[1:], program="vltrain train", options=TRAIN_OPTIONS) -> Settings(config, given, options, ...)

`--KEY VALUE` and `--KEY=VALUE` override the recipe, KEY being any dotted key of `vltrain.config.schema`
(`--model.adapter.dim 8`) or a key inside a mapping (`--model.llm.config.hidden_size 64`); `SHORT_NAMES` abbreviate
some. jsonargparse reads the values and writes the help from the docstrings in `vltrain.config.schema`; names are
checked here first, so that a mistake is one line with the nearest name and never a usage dump. Trade-off: no
abbreviated options, no whole sections on the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_origin

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from vltrain.config.idle import refuse_without_effect
from vltrain.config.key_help import render
from vltrain.config.keys import checked_value, describe_type, known_keys, known_sections, suggest
from vltrain.config.mixture import joined_mapping
from vltrain.config.model.architectures import ARCHITECTURES
from vltrain.config.model.base import ModelConfig
from vltrain.config.older_runs import complete
from vltrain.config.recipe import build_config, dump_config, own_settings, read_recipe, require_own
from vltrain.config.schema import Config
from vltrain.config.strict_yaml import load_text as load_recipe_text
from vltrain.errors import InputError, nearest
from vltrain.shipped import find_recipe

COMMAND_LINE = "command line"
FLAGS = ("help", "print_config")  # of every program
REBUILD, QUIET = "rebuild", "quiet"
SHORT_NAMES = {"bits": "model.bits"}  # settings that have a name of one word on the command line, too
LAUNCHER_OPTIONS = ("local_rank", "local-rank")  # `deepspeed` hands its workers this; the environment says the same


@dataclass(frozen=True)
class Option:
    """An option of a program beside the settings. `metavar` None: it stands alone, and its value is `yes` where it is
    given."""

    help: str
    default: str | None = None
    metavar: str | None = "VALUE"


RANKS = Option(
    "ranks of this machine, or auto for one per accelerator, else two on the CPU; only for `vltrain`: a launcher "
    "sets it itself",
    metavar="N",
)
QUIETLY = Option("show only errors and the last line", metavar=None)
TRAIN_OPTIONS: dict[str, Option] = {
    "ranks": RANKS,
    "ds": Option(
        "DeepSpeed's memory and communication settings, a file such as ds_configs/zero2.json or the name of one of "
        "ds_configs",
        metavar="JSON",
    ),
    "resume": Option(
        "auto: from the newest whole checkpoint in the output folder, if any; never; or a checkpoint's folder",
        "auto",
        "{auto,never,PATH}",
    ),
    REBUILD: Option(
        "prepare and pack again what was made from other sources than the recipe says; what matches stays",
        metavar=None,
    ),
    QUIET: QUIETLY,
}


def refuse_ranks(options: Mapping[str, str | None]) -> None:
    """Raises InputError for --ranks that reached a rank: `vltrain` takes it away."""
    if options.get("ranks") is not None:
        raise InputError(
            f"{COMMAND_LINE}: --ranks: goes with `vltrain train` or `vltrain evaluate`; programs of launch/ "
            "have as many ranks as their launcher starts"
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a program was told: the resolved configuration and how it came about.

    `given` are the dotted keys that the recipe or the command line sets; `overrides` those of the command line alone.
    """

    config: Config
    recipe: Path | None
    given: frozenset[str]
    overrides: frozenset[str]
    options: dict[str, str | None] = field(default_factory=dict)
    positionals: tuple[str, ...] = ()


def whole_number(name: str, text: str, least: int, most: int | None = None, hint: str = "") -> int:
    """The number that an option's text says. Raises InputError, see `Arguments.whole`."""
    if not (text.isascii() and text.isdigit() and least <= int(text[:20]) <= (10**18 if most is None else most)):
        expected = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"
        raise InputError(f"{COMMAND_LINE}: --{name.removeprefix('model.')}: found {text!r}, expected {expected}{hint}")
    return int(text)


@dataclass(frozen=True)
class Arguments:
    """A command line cut into words: `options` in order, with None for a flag's value."""

    options: tuple[tuple[str, str | None], ...]
    positionals: tuple[str, ...]

    def last(self, name: str) -> str | None:
        """The value that option `name` has after all repetitions, None if it is absent."""
        return next((value for option, value in reversed(self.options) if option == name), None)

    def whole(self, name: str, least: int, most: int | None = None, hint: str = "") -> int | None:
        """The whole number that option `name` has, None if it is absent. Raises InputError for another text; `hint`:
        what else to do, for that."""
        text = self.last(name)
        return None if text is None else whole_number(name, text, least, most, hint)

    def require_known(self, names: Sequence[str]) -> None:
        """Raises InputError for an option that is none of `names`: of programs that take no settings."""
        for option, _ in self.options:
            if option not in (*names, *LAUNCHER_OPTIONS):
                raise InputError(f"{COMMAND_LINE}: unknown option '--{option}', {nearest(option, names)}")


def split_arguments(argv: list[str], flags: Collection[str] = FLAGS) -> Arguments:
    """Cuts `argv` into options with their values and the words that stand alone; `flags` take no value. Raises
    InputError for a missing value."""
    options: list[tuple[str, str | None]] = []
    positionals: list[str] = []
    words = iter(["--help" if word == "-h" else word for word in argv])
    for word in words:
        if not word.strip():  # what a shell makes of a variable that is not set
            raise InputError(
                f"{COMMAND_LINE}: found an empty word, expected a name or an option (is a variable of the shell empty?)"
            )
        if not word.startswith("--"):
            positionals.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = SHORT_NAMES.get(name, name)
        if name in flags:
            if equals:
                raise InputError(f"{COMMAND_LINE}: --{name} takes no value, found '{value}'")
            options.append((name, None))
            continue
        following = value if equals else next(words, None)
        if following is None or (not equals and following.startswith("--")):
            raise InputError(f"{COMMAND_LINE}: --{name}: found no value, expected one")
        if (
            not following.strip() and "." not in name
        ):  # the text of an option within a mapping may be empty; other settings are judged by their type
            raise InputError(
                f"{COMMAND_LINE}: --{name}: found an empty text, expected a value (is a variable of the shell empty?)"
            )
        options.append((name, following))
    return Arguments(tuple(options), tuple(positionals))


def load_settings(
    argv: list[str],
    *,
    program: str,
    description: str = "",
    options: Mapping[str, Option] | None = None,
    positionals: tuple[str, ...] = (),
    default_recipe: Path | None = None,
    default_is_checked: bool = False,
    checks_effect: bool = True,
    examples: Sequence[str] = (),
) -> Settings:
    """Reads a program's command line.

    Args:
        argv: the words after the program's name.
        program, description, examples: for the help.
        options: further options of this program, each with one value.
        positionals: names of the words that must stand alone, in order.
        default_recipe: what is read where no `--recipe` is given.
        default_is_checked: it is a run's resolved configuration, checked when the run was made. The command line may
            make a setting of it idle (`--eval.method rank` that of how to generate); only the command line's own
            settings must have an effect.
        checks_effect: False: settings without an effect are the caller's to refuse, see `vltrain.config.stages`.

    `--help` and `--print_config` (the resolved configuration as YAML) print and end the program with exit code 0.
    Raises InputError for anything unknown, of a wrong type, contradictory or without effect.
    """
    recipe_option = Option(
        "YAML file of settings, or the name of one that comes with vltrain; FILE#NAME: a row of a table, or a stage",
        str(default_recipe) if default_recipe else None,
        "FILE",
    )
    options = {"recipe": recipe_option, **(options or {})}
    arguments = split_arguments(
        argv, flags=(*FLAGS, *(name for name, option in options.items() if option.metavar is None))
    )
    if ("help", None) in arguments.options:
        sys.stdout.write(_help(program, description, options, positionals, examples))
        raise SystemExit(0)
    _check_names(arguments, options, positionals)
    chosen = {name: arguments.last(name) or option.default for name, option in options.items()}
    chosen |= {
        name: "yes" for name, option in options.items() if option.metavar is None and (name, None) in arguments.options
    }
    named = chosen.pop("recipe")
    recipe = find_recipe(named, f"{COMMAND_LINE}: --recipe") if named else None
    is_stored = default_is_checked and recipe == default_recipe
    settings = _resolved(arguments, chosen, recipe, is_stored=is_stored, checks_effect=checks_effect)
    if ("print_config", None) in arguments.options:
        sys.stdout.write(dump_config(settings.config))
        raise SystemExit(0)
    return settings


def _resolved(
    arguments: Arguments, options: dict[str, str | None], recipe: Path | None, *, is_stored: bool, checks_effect: bool
) -> Settings:
    """What a recipe and the command line say together. `is_stored`: the recipe is a run's resolved configuration."""
    from_recipe = read_recipe(recipe) if recipe else {}
    if is_stored:
        from_recipe = complete(from_recipe)
    from_command_line = _overrides(arguments, from_recipe)
    given = {**from_recipe, **from_command_line}
    require_own(given, made=from_command_line)
    config = build_config(given)
    if checks_effect:  # what all stages of a recipe share may be idle in the one that is named
        own = own_settings(recipe) if recipe is not None else None
        refuse_without_effect(
            config, {} if is_stored else from_recipe if own is None else own, frozenset(from_command_line)
        )
    return Settings(
        config=config,
        recipe=recipe,
        given=frozenset(given),
        overrides=frozenset(from_command_line),
        options=options,
        positionals=arguments.positionals,
    )


def _check_names(arguments: Arguments, options: Mapping[str, Option], positionals: tuple[str, ...]) -> None:
    for name, _ in arguments.options:
        if name in options or name in FLAGS or name in LAUNCHER_OPTIONS or _setting_of(name):
            continue
        if name in known_sections():
            raise InputError(
                f"{COMMAND_LINE}: --{name} is a section, expected one of its keys, such as --{_first_key(name)}"
            )
        hint = nearest(name, [*options, *FLAGS]) if "." not in name else ""
        raise InputError(
            f"{COMMAND_LINE}: unknown option '--{name}', {hint if hint.startswith('did you mean') else suggest(name)}"
        )
    if len(arguments.positionals) != len(positionals):
        expected = " ".join(positionals) or "options only (--KEY VALUE)"
        found = " ".join(map(repr, arguments.positionals)) or "no word that stands alone"
        raise InputError(f"{COMMAND_LINE}: found {found}, expected {expected}")
    if sum(name == "recipe" for name, _ in arguments.options) > 1:
        raise InputError(
            f"{COMMAND_LINE}: found several --recipe, expected one (override single keys with --KEY VALUE)"
        )


def _first_key(section: str) -> str:
    return next(key for key in known_keys() if key.startswith(f"{section}."))


def _setting_of(name: str) -> str | None:
    """The setting that option `name` sets, wholly or (`model.llm.config.hidden_size`) in a key of its mapping."""
    if name in known_keys():
        return name
    mappings = (key for key, known in known_keys().items() if get_origin(known.annotation) is dict)
    return next((key for key in mappings if name.startswith(f"{key}.") and len(name) > len(key) + 1), None)


def _overrides(arguments: Arguments, from_recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings on the command line by dotted key; keys of a mapping are put into the recipe's mapping."""
    overrides: dict[str, Any] = {}
    for name, text in arguments.options:
        key = _setting_of(name)
        if key is None:
            continue
        value = _read_value(name, key, text)
        if name != key:
            value = joined_mapping(key, overrides.get(key, from_recipe.get(key, known_keys()[key].default)), value)
        overrides[key] = checked_value(key, value, COMMAND_LINE)
    return overrides


def _read_value(name: str, key: str, text: str | None) -> Any:
    try:
        owners = known_keys()[key].architectures
        section = ARCHITECTURES[owners[0]] if owners else ModelConfig
        return _parser_of(section).parse_args([f"--{name}={text}"], defaults=False)[key]
    except (argparse.ArgumentError, RecursionError):
        expected = describe_type(known_keys()[key].annotation)
        raise InputError(f"{COMMAND_LINE}: --{name}: found {text!r}, expected {expected}") from None


def _help(
    program: str, description: str, options: Mapping[str, Option], positionals: Sequence[str], examples: Sequence[str]
) -> str:
    listed = [
        (name if option.metavar is None else f"{name} {option.metavar}", option.help, option.default)
        for name, option in options.items()
    ]
    listed += [(f"{name} VALUE", f"short for --{key}", None) for name, key in SHORT_NAMES.items()]
    listed += [
        ("print_config", "print the resolved configuration as YAML and end", None),
        ("help", "show this text and end", None),
    ]
    usage = " ".join([program, *(name.upper() for name in positionals), "[--OPTION VALUE ...] [--KEY VALUE ...]"])
    meanings: dict[str, str] = {}
    sections: dict[str, str] = {}
    for group in (group for parser in _parsers() for group in parser._action_groups):
        for action in group._group_actions:
            if action.dest in known_keys():
                meanings[action.dest] = action.help or ""
                sections.setdefault(action.dest.rpartition(".")[0], (group.title or "").rstrip(":."))
    return render(usage, description, listed, meanings, sections, examples)


def _parsers() -> Iterator[Any]:
    """What reads the values of the command line, and knows the meaning of each key from its docstring."""
    yield from map(_parser_of, (ModelConfig, *ARCHITECTURES.values()))


@cache
def _parser_of(section: type[ModelConfig]) -> Any:
    """Of an architecture's own settings; of `ModelConfig` those that all have, and what is not the model's.

    Returns: an ArgumentParser, whose methods leave their types open.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("recipe", load_recipe_text, exceptions=(yaml.YAMLError,))
    parser: Any = ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode="recipe")
    if section is ModelConfig:
        parser.add_class_arguments(ModelConfig, "model")
        parser.add_class_arguments(Config, None, skip={"model"})
    else:
        parser.add_class_arguments(section, "model", skip={entry.name for entry in fields(ModelConfig)})
    return parser
