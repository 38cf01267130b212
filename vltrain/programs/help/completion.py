"""`vltrain completion bash|zsh|fish`: a script by which the shell completes vltrain's commands, options, recipe
keys and their choices.

    eval "$(vltrain completion bash)"                                        in ~/.bashrc, or once and for all:
    vltrain completion bash > ~/.local/share/bash-completion/completions/vltrain
    vltrain completion zsh > ~/.zfunc/_vltrain                               with fpath+=~/.zfunc before compinit
    vltrain completion fish > ~/.config/fish/completions/vltrain.fish

The script is fixed text, so that completing starts no Python; make it anew after an update. What it knows is read off
each command's own --help.
Needs the package shtab: pip install 'vltrain[completion]'.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Iterable, Mapping

from vltrain.config.command_line import COMMAND_LINE, split_arguments
from vltrain.config.keys import known_keys
from vltrain.errors import InputError, exits_cleanly, nearest
from vltrain.export.table import FORMATS
from vltrain.programs.check import CHECKS
from vltrain.programs.help.recipes import names as recipe_names
from vltrain.shipped import DS_CONFIGS

Commands = Mapping[str, tuple[str, str]]
"""By name: the module of a command, and what it does."""
SHELLS = ("bash", "zsh", "fish")
# `--NAME`, and what it takes where it takes something: {a,b}, a|b, FILE, 8000.
OPTION = re.compile(
    r"(?<![\w-])--([a-z][\w.-]*\w)(?: (\{[^}]*\}|\[(?!-)[^\]]*\]|[A-Z0-9][^\s\]]*|[a-z0-9]+(?:\|[a-z0-9]+)+))?"
)
PATHS = {"FILE", "FOLDER", "PATH", "JSON", "DIR", "SAMPLES", "OUTPUT"}
WITH_KEYS = ("ablate",)  # whose help leaves the keys of recipes to that of `train`


@exits_cleanly
def main(argv: list[str], *, commands: Commands) -> int:
    """Prints the script of a shell. Returns the exit code. `commands`: all of vltrain's, see `vltrain.cli`."""
    arguments = split_arguments(argv)
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    arguments.require_known(())
    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected one of {', '.join(SHELLS)}")
    shell = arguments.positionals[0]
    if shell not in SHELLS:
        raise InputError(f"{COMMAND_LINE}: found '{shell}', {nearest(shell, SHELLS)}")
    print(script(shell, commands))
    return 0


def script(shell: str, commands: Commands) -> str:
    """The script for one of `SHELLS`. Raises InputError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise InputError("vltrain completion needs the package shtab; pip install 'vltrain[completion]'") from None
    return shtab.complete(whole_parser(commands), shell, preamble=_preamble())


def whole_parser(commands: Commands) -> argparse.ArgumentParser:
    """All of vltrain as a parser, for shtab to read."""
    root = argparse.ArgumentParser(prog="vltrain")
    subparsers = root.add_subparsers()
    texts = {command: help_text(module) for command, (module, _) in commands.items() if command != "completion"}
    for command, (_, summary) in commands.items():
        parser = subparsers.add_parser(command, help=summary.replace("'", ""))
        _add_words(parser, command)
        found = options_in(texts.get(command, ""))
        if command in WITH_KEYS:
            found = {
                **{name: value for name, value in options_in(texts["train"]).items() if name in known_keys()},
                **found,
            }
        for name, value in found.items():
            _add_option(parser, command, name, value)
    return root


def help_text(module: str) -> str:
    """What a command's --help prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return text.getvalue()


def options_in(text: str) -> dict[str, str | None]:
    """The options that a help names, and what each takes; None for one that stands alone."""
    found: dict[str, str | None] = {}
    for name, value in OPTION.findall(text):
        if name not in ("help", "KEY", "OPTION") and not found.get(name):
            found[name] = value.rstrip(",);") or None
    return found


def choices_in(value: str) -> list[str]:
    """`{a,b}` and `a|b` as a list; [] where it says a kind of value."""
    if value.startswith("{") and ":" not in value:
        return [one.strip() for one in value[1:-1].split(",")]  # a long list goes on in the next line
    return value.split("|") if "|" in value and value == value.lower() else []


def _add_words(parser: argparse.ArgumentParser, command: str) -> None:
    """The words that stand alone."""
    known: dict[str, Iterable[str]] = {"check": CHECKS, "completion": SHELLS}
    if command in known:
        parser.add_argument("what", choices=list(known[command]))
    if command in ("plan", "ablate", "recipes"):
        parser.add_argument("recipe_name").complete = _completes("recipe")
    elif command != "completion":
        parser.add_argument("path", nargs="*").complete = _completes("file")


def _add_option(parser: argparse.ArgumentParser, command: str, name: str, value: str | None) -> None:
    if value is None:
        parser.add_argument(f"--{name}", action="store_true")
        return
    same_as = {("prepare", "source"): "data.source", ("pack", "template"): "data.template"}.get((command, name))
    listed = (
        [one for one in known_keys()[same_as].choices() if one not in ("null", "samples")]
        if same_as
        else choices_in(value)
    )
    if (command, name) == ("export", "format"):
        listed = sorted({form for forms in FORMATS.values() for form in forms})
    if name in ("recipe", "ds"):
        parser.add_argument(f"--{name}").complete = _completes(name)
    elif any(one.isupper() for one in listed) or value in PATHS:
        parser.add_argument(f"--{name}").complete = _completes("file")
    else:
        parser.add_argument(f"--{name}", choices=listed or None)


def _completes(what: str) -> dict[str, str]:
    """How each shell completes a file, or a name of what comes with vltrain, or a file."""
    if what == "file":
        return {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": "(__fish_complete_path)"}
    return {"bash": f"_vltrain_{what}", "zsh": f"_vltrain_{what}", "fish": f"(__vltrain_{what})"}


def _preamble() -> dict[str, str]:
    names = {"recipe": recipe_names(), "ds": sorted(path.stem for path in DS_CONFIGS.glob("*.json"))}
    texts: dict[str, list[str]] = {shell: [] for shell in SHELLS}
    for what, listed in names.items():
        words = " ".join(listed)
        texts["bash"].append(f'_vltrain_{what}() {{\n  compgen -W \'{words}\' -- "$1"\n  compgen -f -- "$1"\n}}')
        texts["zsh"].append(
            f"_vltrain_{what}() {{\n  local -a names=({' '.join(map(repr, listed))})\n  compadd -a names\n  _files\n}}"
        )
        texts["fish"].append(
            f"function __vltrain_{what}\n  printf '%s\\n' {' '.join(map(repr, listed))}\n  __fish_complete_path "
            "(commandline -ct)\nend"
        )
    return {shell: "\n".join(parts) for shell, parts in texts.items()}
