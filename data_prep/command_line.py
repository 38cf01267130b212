"""Command lines of the data programs: argparse, but a mistake is one line with the nearest option, never a usage dump.

Options are not abbreviated: what a script says today must not become ambiguous by an option added tomorrow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vltrain.config.ranges import Range
from vltrain.data.remote.address import is_address
from vltrain.errors import InputError, nearest


def whole(low: int, high: int) -> Callable[[str], int]:
    """argparse's `type` of an option that takes a whole number in [low, high]."""
    allowed = Range(low, high)

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {text!r:.60}, expected a whole number") from None
        if not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"found {value}, expected {allowed}")
        return value

    return read


def folder_here(text: str) -> Path:
    """argparse's `type` of an option that takes a folder to write."""
    if is_address(text):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected a folder of this machine; write it here and copy it there (launch/REMOTE.md)"
        )
    return Path(text)


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show only errors and the last line")


class CommandLine(argparse.ArgumentParser):
    """The parser of `data_prep.NAME`, called by `python -m` or, for those that are its commands, by `vltrain`."""

    def __init__(self, name: str, description: str, arguments: list[str] | None, examples: Sequence[str] = ()) -> None:
        """Args: name: the module below `data_prep`. arguments: what `main` was given; None where it is the program
        itself. examples: words of commands, for the help."""
        typed = f"python -m data_prep.{name}" if arguments is None else f"vltrain {name}"
        epilog = "\n".join(["examples:", *(f"  {typed} {example}" for example in examples)]) if examples else None
        super().__init__(
            prog=typed,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._words = sys.argv[1:] if arguments is None else arguments

    def read(self) -> argparse.Namespace:
        """The options' values. Raises InputError for anything unknown, missing or of a wrong type."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in self._words:
            option = word.partition("=")[0]
            if word.startswith("--") and option not in known:
                raise InputError(f"{self.prog}: unknown option '{option}', {nearest(option, known)}")
        return self.parse_args(self._words)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")
