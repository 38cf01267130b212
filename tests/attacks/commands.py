"""Attacks by the words of a command line: places that are none, names that a terminal obeys, numbers out of range."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.attacks.attack import AttackFailed, Shown, attack, refused, right
from tests.support.processes import ROOT
from vltrain.cli import COMMANDS
from vltrain.errors import one_line

PLACES, NAMES, NUMBERS = "a place that is none", "names that a terminal obeys", "numbers that are none or out of range"
READERS = (
    ("peek",),
    ("check", "resume"),
    ("check", "replay", "--step", "1"),
    ("check", "weights"),
    ("evaluate",),
    ("export", "--output", "OUT"),
    ("importance", "--output", "OUT"),
    ("blame",),
    ("compare", ROOT / "tests" / "golden" / "stored" / "mmt" / "run"),
)
RECIPE, DS = ROOT / "launch" / "recipes" / "quickstart.yaml", ROOT / "ds_configs" / "zero2.json"


def with_each_reader(folder: Path, place: object) -> Shown:
    """Every command that reads a folder is given that place; each must refuse it and leave nothing."""
    lines = []
    for command, *more in READERS:
        words = [command, *(more[:1] if command == "check" else ()), place, *(more[1:] if command == "check" else more)]
        lines.append(refused([folder / "OUT" if word == "OUT" else word for word in words], untouched=folder).line)
    return Shown("refused", f"by {len(lines)} commands, evaluate: {lines[4]}")


def _enter(name: str, what: str, make: Callable[[Path], object]) -> None:
    def run(folder: Path) -> Shown:
        return with_each_reader(folder, make(folder))

    run.__name__, run.__doc__ = name, what
    attack(PLACES)(run)


def _file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def _folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _link(folder: Path, target: str) -> Path:
    (folder / "link").symlink_to(target)
    return folder / "link"


_enter(
    "nothing_there",
    "A folder that is not there, given to every command that reads one.",
    lambda folder: folder / "nowhere",
)
_enter("a_file", "A file where a folder is expected.", _file)
_enter("empty_folder", "An empty folder.", _folder)
_enter("dangling_link", "A link to nothing.", lambda folder: _link(folder, "nowhere"))
_enter("link_to_itself", "A link to itself.", lambda folder: _link(folder, "link"))
_enter("below_a_file", "A folder below a file.", lambda folder: _file(folder) / "run")
_enter("endless_name", "A name of 300 letters.", lambda folder: folder / ("a" * 300))
_enter("no_name", "An empty name.", lambda folder: "")


@attack(NAMES)
def line_end_in_a_name(folder: Path) -> Shown:
    """A file whose name has a line end: the error stays one line."""
    (folder / "a\nerror: b").write_text("{}")
    return refused(
        ["prepare", "--source", "llava_json", "--input", folder / "a\nerror: b", "--output", folder / "out"],
        "a error: b",
        untouched=folder,
    )


@attack(NAMES)
def escape_sequence_in_a_name(folder: Path) -> Shown:
    """A recipe whose name clears the terminal."""
    (folder / "\x1b[2Jrecipe.yaml").write_text("[]")
    shown = refused(["plan", folder / "\x1b[2Jrecipe.yaml", "--ds", DS], "\\x1b[2Jrecipe.yaml", "found []")
    assert "\x1b" not in shown.line
    return shown


@attack(NAMES)
def hidden_characters(folder: Path) -> Shown:
    """Letters that turn the line around, end it, or have no encoding are written out; others stay."""
    found = one_line("é 漢\u202e\u2028\ud800\x07\r\nend")
    assert found == "é 漢\\u202e\\u2028\\ud800\\x07  end", found
    return right(found)


@attack(NAMES)
def escape_sequence_in_a_file(folder: Path) -> Shown:
    """A sample whose id holds an escape sequence, quoted by the error."""
    record = {"id": "\x1b]0;owned\x07", "turns": [{"role": "user", "text": "Q?"}, {"role": "assistant", "text": ""}]}
    (folder / "s.jsonl").write_text(json.dumps(record) + "\n")
    words = [
        "pack",
        "--samples",
        folder / "s.jsonl",
        "--tokenizer",
        "asset://tiny_llama",
        "--visual-tokens",
        4,
        "--pack-length",
        64,
    ]
    shown = refused([*words, "--output", folder / "packs"], "\\x1b]0;owned\\x07", untouched=folder)
    assert "\x1b" not in shown.line
    return shown


def _refuse_numbers(words: list[object], option: str, values: tuple[str, ...], folder: Path) -> Shown:
    taken = []
    for value in values:
        try:
            line = refused([*words, option, value], untouched=folder).line
        except AttackFailed as error:
            if error.how != "silent":
                raise
            taken.append(value)
    if taken:
        raise AttackFailed("silent", f"{option} {taken} taken")
    return Shown("refused", f"{', '.join(values)}; the last: {line}")


@attack(NUMBERS)
def numbers_of_plan(folder: Path) -> Shown:
    """GPUs to plan for: 0, less, a fraction, a text, none."""
    return _refuse_numbers(["plan", RECIPE, "--ds", DS], "--gpus", ("0", "-1", "1e9", "nan", "two", "1.5", ""), folder)


@attack(NUMBERS)
def numbers_of_prepare(folder: Path) -> Shown:
    """Workers of prepare: less than one, or a text."""
    return _refuse_numbers(
        ["prepare", "--source", "shapes", "--output", folder / "out"],
        "--workers",
        ("0", "-3", "many", "1.5", "inf"),
        folder,
    )


@attack(NUMBERS)
def pixels_of_prepare(folder: Path) -> Shown:
    """Pixels that an image may have: none, less, a text."""
    return _refuse_numbers(
        ["prepare", "--source", "shapes", "--output", folder / "out"],
        "--max-image-pixels",
        ("0", "-1", "big", "nan"),
        folder,
    )


@attack(NUMBERS)
def numbers_of_pack(folder: Path) -> Shown:
    """Each number of pack, below its least."""
    (folder / "s.jsonl").write_text("")
    words = ["pack", "--samples", folder / "s.jsonl", "--tokenizer", "asset://tiny_llama", "--output", folder / "packs"]
    least = {
        "--visual-tokens": 4,
        "--pack-length": 64,
        "--max-images": 1,
        "--workers": 1,
        "--max-image-pixels": 100,
        "--qformer-tokens": 8,
    }
    lines = []
    for name in least:
        given = [word for option, value in least.items() if option != name for word in (option, value)]
        lines.append(refused([*words, *given, name, "-1"], untouched=folder).line)
        assert "s.jsonl" not in lines[-1], (name, lines[-1])
    return Shown("refused", "; ".join(lines))


@attack(NUMBERS)
def step_to_replay(folder: Path) -> Shown:
    """Steps of a replay that are none."""
    return _refuse_numbers(["check", "replay", folder], "--step", ("-1", "x", "1.0", ""), folder)


@attack(NAMES)
def option_nearly_right(folder: Path) -> Shown:
    """An option that is nearly right, of each command."""
    lines = [refused([name, "--outptu", "x"], untouched=folder).line for name in COMMANDS if name != "check"]
    return Shown("refused", f"by {len(lines)} commands; the last: {lines[-1]}")


@attack("settings that are empty")
def variable_that_is_not_set(folder: Path) -> Shown:
    """Options whose value an empty variable of the shell gave: not the default in silence."""
    lines = []
    for words in (
        ["train", "--recipe", "", "--ds", DS],
        ["train", "--ds", ""],
        ["train", "--ds", DS, "--output", ""],
        ["train", "--ds", DS, "--resume", ""],
    ):
        lines.append(refused(words, "found", "empty", untouched=folder).line)
    for key in ("data.root", "data.source", "data.train_split", "model.llm.source", "eval.scorer"):
        lines.append(refused(["train", "--ds", DS, f"--{key}", ""], key, "found", untouched=folder).line)
    return Shown("refused", lines[-1])


@attack("settings that are empty")
def empty_text_in_a_recipe(folder: Path) -> Shown:
    """A recipe with an empty folder's name, and one of blanks."""
    for text in ('""', '"  "'):
        (folder / "recipe.yaml").write_text(f"data: {{root: {text}}}\noutput: runs/x\n")
        shown = refused(
            ["train", "--recipe", folder / "recipe.yaml", "--ds", DS], "data.root", "a text that is not empty"
        )
    return shown
