"""Files and modules that comments, recipes, scripts and pages name are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("launch", "ds_configs", "vltrain", "data_prep", "tests", ".github")
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, ROOMS))})/[\w./*-]*[\w*])(?!/?[{{\w])")
MODULE = re.compile(r"(?<![\w./-])((?:vltrain|data_prep|tests)(?:\.[A-Za-z_]\w*)+)")
FILE = re.compile(r"(?<![\w./*-])([A-Za-z_]\w*\.(?:yaml|sbatch|sh|md|py))\b(?!\()")
PLACEHOLDER = re.compile(r"\b(NAME|FILE|TABLE|OTHER|YOUR\w*|X)\b")
DIFF = re.compile(r"^```diff\n.*?^```$", re.MULTILINE | re.DOTALL)  # names files that it adds
HISTORY = ROOT / ".github" / "CHANGELOG.md"  # names what was
MADE = {"config.yaml", "recipe.yaml", "table.md", "row.json"}  # by programs
SUFFIXES = (".md", ".yaml", ".sh", ".sbatch", ".json", ".cfg", ".toml", ".py")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name.endswith(SUFFIXES) and (ROOT / name).is_file()]


FILES = tracked()


def missing_paths(text: str) -> set[str]:
    """Paths below the rooms of this repository that `text` names and that are not there."""
    return {
        name
        for name in PATH.findall(text)
        if not PLACEHOLDER.search(name) and not any(ROOT.glob(name)) and not (ROOT / name).exists()
    }


def missing_modules(text: str) -> set[str]:
    """Dotted names that begin with a module of ours and end in nothing that it says."""
    return {
        name
        for name in MODULE.findall(text)
        if not PLACEHOLDER.search(name) and not name.endswith("__") and not _is_there(name)
    }


def _is_there(name: str) -> bool:
    if (ROOT / name).exists() or any(ROOT.glob(f"{name}.*")):  # a file's name, such as vltrain.egg-info
        return True
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if file.is_file() or place.is_dir():
            rest = parts[length:]
            text = "\n".join(path.read_text() for path in ([file] if file.is_file() else []))
            return not rest or re.search(rf"\b{re.escape(rest[0])}\b", text) is not None
    return False


def missing_files(path: Path, text: str) -> set[str]:
    """Bare file names in a recipe's or script's comments that stand neither beside it nor anywhere else here."""
    comments = "\n".join(line[line.index("#") :] for line in text.splitlines() if "#" in line)
    known = {one.name for one in FILES} | MADE
    return {name for name in FILE.findall(comments) if not PLACEHOLDER.search(name) and name not in known}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if (path.suffix == ".md" or not path.is_relative_to(ROOT / "tests")) and path != HISTORY],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_a_file_names_is_there(path):
    text = DIFF.sub("", path.read_text(encoding="utf-8"))
    assert missing_paths(text) == set()
    if path.suffix not in (".json", ".cfg"):
        assert missing_modules(text) == set()
    if path.suffix in (".yaml", ".sh", ".sbatch"):
        assert missing_files(path, text) == set()


def test_what_is_not_there_is_found():
    """The checks above can fail."""
    assert missing_paths(
        "see launch/recipes/no_such.yaml and `ds_configs/zero9.json`, not launch/*.py, launch/recipes/NAME.yaml"
    ) == {
        "launch/recipes/no_such.yaml",
        "ds_configs/zero9.json",
    }
    assert missing_modules(
        "`vltrain.models.no_such`, vltrain.errors.NoSuchError, but vltrain.errors.InputError, vltrain.files"
    ) == {
        "vltrain.models.no_such",
        "vltrain.errors.NoSuchError",
    }
    assert missing_files(ROOT / "x.yaml", "a: b.yaml\n# as no_such.yaml, quickstart.yaml, OTHER.yaml\n") == {
        "no_such.yaml"
    }
