"""Work on a data set in parts, one for each task of a job array, and the merge that makes of them what one process
would have made.

    OUTPUT.parts/part-00003-of-00008/     what part 3 made, and part.json: with which settings, and the SHA-256 of its
                                          files
    OUTPUT                                the result, made by the merge, which removes OUTPUT.parts

A part appears whole or not at all, so one that failed is simply run again, alone. The merge takes only a full set made
with its own settings.
"""

from __future__ import annotations

import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.command_line import CommandLine
from vltrain.data.folder import new_folder, refuse_existing
from vltrain.errors import InputError
from vltrain.files.digest import sha256_of
from vltrain.files.strict_json import read_object

logger = logging.getLogger(__name__)

RECORD = "part.json"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the work is done: `part` of `parts`, from 1; or, with `part` None, the merge of all; with
    `in_turn`, before it the parts that are not done yet."""

    parts: int
    part: int | None
    in_turn: bool = False

    def __post_init__(self) -> None:
        if self.parts < 1 or not (self.part is None or 1 <= self.part <= self.parts):
            raise InputError(
                f"parts: found part {self.part} of {self.parts}, expected a part from 1 to the number of parts"
            )

    def bounds(self, part: int, total: int) -> tuple[int, int]:
        """The first and the one after the last of `total` things that `part` has."""
        return total * (part - 1) // self.parts, total * part // self.parts


def add_share_options(parser: CommandLine) -> None:
    """Adds --parts, --part and --merge."""
    parser.add_argument(
        "--parts",
        type=int,
        help="split the work into this many parts, of which a killed command keeps those that it has done; or run each "
        "with --part, then --merge",
    )
    parser.add_argument("--part", type=int, help="which part to do, from 1")
    parser.add_argument("--merge", action="store_true", help="merge the parts into the output")


def read_share(given: Namespace) -> Share | None:
    """Takes the three options out of `given`. Returns None where the whole work is done at once."""
    parts, part, merge = (vars(given).pop(name) for name in ("parts", "part", "merge"))
    if parts is None and part is None and not merge:
        return None
    if parts is None or (part is not None and merge):
        raise InputError("--parts N goes alone, with --part I or with --merge, expected one of the three")
    return Share(parts=parts, part=part, in_turn=part is None and not merge)


def part_folder(output: Path, part: int, parts: int) -> Path:
    """Where a part's result is."""
    return _parts_folder(output) / f"part-{part:05d}-of-{parts:05d}"


def _parts_folder(output: Path) -> Path:
    return output.parent / f"{output.name}.parts"


@contextmanager
def new_part(output: Path, share: Share, made_with: Mapping[str, Any]) -> Generator[Path]:
    """Gives a folder to fill, which becomes the part's when the block ends without an error.

    Raises:
        InputError: the part is there already, or cannot be written.
    """
    assert share.part is not None
    folder = part_folder(output, share.part, share.parts)
    with new_folder(folder) as temporary:
        yield temporary
        files = {
            path.name: sha256_of(path)
            for path in sorted(temporary.iterdir())
            if path.is_file() and not path.match("*.stats.npy")
        }
        (temporary / RECORD).write_text(
            json.dumps({"made_with": made_with, "files": files}, indent=1) + "\n", encoding="utf-8"
        )


def missing_parts(output: Path, share: Share, made_with: Mapping[str, Any]) -> list[int]:
    """The parts that are not there yet, of all or of `share.part` alone; tells of those that are. Raises InputError if
    one was made with other settings, or is damaged, or if all parts are merged already."""
    refuse_existing(output)
    asked = range(1, share.parts + 1) if share.part is None else (share.part,)
    folders = {part: part_folder(output, part, share.parts) for part in asked}
    done = [part for part, folder in folders.items() if folder.exists()]
    for part in done:
        _require_same(folders[part], made_with)
    if share.part in done:
        logger.warning("%s: is there already; nothing to do", folders[share.part])
    elif done:
        logger.warning("%s: going on: %d of %d parts are done", folders[1].parent, len(done), share.parts)
    return [part for part in folders if part not in done]


def was_merged(output: Path) -> bool:
    """Whether a merge was killed when its result was whole and its parts were not yet removed."""
    return output.is_dir() and any(output.iterdir()) and _parts_folder(output).is_dir()


def finished_parts(output: Path, share: Share, made_with: Mapping[str, Any]) -> list[Path]:
    """The folders of all parts, in order. Raises InputError naming those that are missing, damaged, or made with other
    settings."""
    folders = [part_folder(output, part, share.parts) for part in range(1, share.parts + 1)]
    missing = [str(part) for part, folder in enumerate(folders, start=1) if not folder.exists()]
    if missing:
        raise InputError(
            f"{folders[0].parent}: {len(missing)} of {share.parts} parts are missing; run part "
            f"{','.join(missing)}, then merge again"
        )
    for folder in folders:
        _require_same(folder, made_with)
    return folders


def require_same_raw(folders: list[Path], raw: str) -> None:
    """Raises InputError for a part that was made of other raw data than has this digest."""
    for folder in folders:
        _require_equal(folder, read_object(folder / RECORD)["made_with"], {"raw": raw})


def remove_parts(output: Path) -> None:
    """Removes what the merge has used up."""
    shutil.rmtree(_parts_folder(output))


def _require_same(folder: Path, made_with: Mapping[str, Any]) -> None:
    try:
        record = read_object(folder / RECORD)
        before, files = record["made_with"], record["files"]
        damaged = [
            name
            for name, digest in files.items()
            if not (folder / name).is_file() or sha256_of(folder / name) != digest
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / RECORD}: cannot be read ({error}); remove the folder and run the part again"
        ) from None
    if damaged:
        raise InputError(
            f"{folder / damaged[0]}: missing or changed since it was written; remove {folder} and run the part again"
        )
    _require_equal(folder, before, json.loads(json.dumps(made_with)))


def _require_equal(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = [
        f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in sorted(now) if before.get(name) != now[name]
    ]
    if differences:
        raise InputError(
            f"{folder}: was made with other settings or data: {'; '.join(differences)}; remove it and run the "
            "part again"
        )
