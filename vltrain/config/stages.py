"""A run in stages: a recipe whose `stages` are trained one after another, each from the weights of the one before.

    load_stages(sys.argv[1:], ...) -> the settings of each stage; of another recipe those of its one run

Each stage is a run of its own below the folder of the whole, RUN/1-NAME, RUN/2-NAME, ...; RUN/stages.json lists them.
What is the command line's holds for all stages. A setting that all share may be idle in some of them
(`model.adapter.dim` where only the neck is tuned), but not in all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.config.command_line import (
    COMMAND_LINE,
    FLAGS,
    Option,
    Settings,
    load_settings,
    split_arguments,
)
from vltrain.config.idle import idle_settings, made_settings
from vltrain.config.keys import keys_of, known_keys
from vltrain.config.model.architectures import KEY as ARCHITECTURE
from vltrain.config.recipe import INIT_FROM, Stages, read_stages, require_tuned
from vltrain.config.schema import Config
from vltrain.config.strict_yaml import dump_text, is_mapping
from vltrain.errors import InputError
from vltrain.files.atomic import write_json
from vltrain.files.strict_json import is_list, is_sequence, read_json
from vltrain.shipped import find_recipe

STAGES_FILE = "stages.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command line asks to be trained. `folder`: of the whole; `names`: of the stages, () of a run that has
    none; `parts`: the settings of each."""

    folder: Path
    names: tuple[str, ...]
    parts: tuple[Settings, ...]


def load_stages(
    argv: list[str], *, options: Mapping[str, Option], default_recipe: Path | None = None, **named: Any
) -> Run:
    """Reads a program's command line, whose recipe may be one in stages. Arguments as of `load_settings`.

    Raises: InputError as `load_settings`, for stages over different frozen weights, and for settings that no stage
    obeys.
    """
    flags = (*FLAGS, *(name for name, option in options.items() if option.metavar is None))
    arguments = split_arguments(argv, flags)
    recipe = arguments.last("recipe") or (str(default_recipe) if default_recipe else None)
    asks_help = ("help", None) in arguments.options
    stages = None if recipe is None or asks_help else read_stages(find_recipe(recipe, f"{COMMAND_LINE}: --recipe"))
    if stages is None:
        settings = load_settings(argv, options=options, default_recipe=default_recipe, **named)
        return Run(folder=Path(settings.config.output), names=(), parts=(settings,))
    words = [word for word in _without(argv, ("recipe", "output")) if word != "--print_config"]
    output = arguments.last("output") or stages.settings["output"]
    parts: list[Settings] = []
    for name in stages.stages:
        before = stages.before(name)
        begins = [f"--{INIT_FROM}={stages.folder_of(before, output)}"] if before is not None else []
        own = ["--recipe", str(stages.recipe_of(name)), f"--output={stages.folder_of(name, output)}", *begins]
        try:
            parts.append(load_settings([*words, *own], options=options, checks_effect=False, **named))
        except InputError as error:
            raise InputError(f"{error} (stage '{name}' of {stages.path})") from None
    given = frozenset(name for name, _ in arguments.options)
    _require_effect(stages, parts, given)
    _require_one_base(stages, parts)
    run = Run(folder=Path(output), names=tuple(stages.stages), parts=tuple(parts))
    if ("print_config", None) in arguments.options:
        sys.stdout.write(dump_run(run))
        raise SystemExit(0)
    return run


def refuse_untuned(whole: Run) -> None:
    """Raises InputError for a recipe of which nothing is trained, see `vltrain.config.recipe.require_tuned`."""
    for part in whole.parts:
        if part.recipe is not None:
            require_tuned(part.recipe)


def _without(argv: Iterable[str], names: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if name not in names:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _require_effect(stages: Stages, parts: list[Settings], given: frozenset[str]) -> None:
    idle = [idle_settings(part.config) for part in parts]
    for name, one in zip(stages.stages, idle, strict=True):
        for key in made_settings(stages.stages[name], frozenset()):
            if key in one and key not in given:
                raise InputError(
                    f"{stages.path}: stage '{name}': {key}: has no effect: {one[key]}; leave it out, or change "
                    "the other"
                )
    for key in made_settings(stages.settings, given & known_keys().keys()):
        if all(key in one for one in idle):
            raise InputError(f"{key}: has no effect in any stage: {idle[-1][key]}; leave it out, or change the other")


def _require_one_base(stages: Stages, parts: list[Settings]) -> None:
    """Raises InputError if stages are over different frozen weights, before the first is trained."""
    first, *others = zip(stages.stages, parts, strict=True)
    for name, part in others:
        for key in (ARCHITECTURE, *(f"model.{name}" for name in first[1].config.model.FROZEN), "model.seed"):
            before, now = value_of(first[1].config, key), value_of(part.config, key)
            if before != now:
                raise InputError(
                    f"{stages.path}: stage '{name}': {key}: found {now!r}, expected {before!r} as in stage "
                    f"'{first[0]}', whose weights it begins with"
                )


def value_of(config: Config, key: str) -> Any:
    """A setting by its dotted name."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def dump_run(run: Run) -> str:
    """The whole, resolved, as a recipe in stages that `load_stages` reads back: what all stages share first, then what
    each has for itself."""
    values = [
        {key: value_of(part.config, key) for key in keys_of(part.config.model.architecture)} for part in run.parts
    ]
    shared = {
        key: value for key, value in values[0].items() if key != "output" and all(one[key] == value for one in values)
    }
    own = {
        name: _nested(
            {
                key: value
                for key, value in one.items()
                if key not in shared and key != "output" and (key != INIT_FROM or number == 0)
            }
        )
        for number, (name, one) in enumerate(zip(run.names, values, strict=True))
    }
    return dump_text({"output": str(run.folder), **_nested(shared), "stages": own})


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = list(value) if is_sequence(value) else value
    return whole


def write_stages(run: Run) -> None:
    """Says in the folder of the whole which stages it has. Raises InputError for a folder that holds others, or another
    run."""
    names = [Path(part.config.output).name for part in run.parts]
    found = [folder.name for folder in stage_folders(run.folder)]
    if found and found != names:
        raise InputError(
            f"{run.folder}: holds a run in the stages {', '.join(found)}, this one has {', '.join(names)}; "
            "choose another --output"
        )
    if not found and (run.folder / "checkpoints").is_dir():
        raise InputError(f"{run.folder}: holds a run that has no stages; choose another --output")
    if not found:
        write_json(run.folder / STAGES_FILE, {"stages": names})


def stage_folders(folder: Path) -> list[Path]:
    """The runs of the stages of a run in stages; [] for any other folder. Raises InputError for a list that is none."""
    path = folder / STAGES_FILE
    if not path.is_file():
        return []
    listed = read_json(path)
    names = listed.get("stages") if is_mapping(listed) else None
    if not is_list(names) or not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{path}: found {listed!r:.80}, expected the folders of the stages; the file was changed")
    return [folder / name for name in names]


def last_stage(folder: Path) -> Path:
    """The run whose weights a folder stands for: of a run in stages the last stage's, else itself."""
    return (stage_folders(folder) or [folder])[-1]
