"""What comes with vltrain beside its modules, and may be named without a path: recipes, DeepSpeed's JSON files,
programs and files for Slurm.

In a checkout these are the folders launch/ and ds_configs/ beside the package; an installed vltrain has both inside of
it.
"""

from __future__ import annotations

import configparser
import importlib.metadata
from pathlib import Path

from vltrain.errors import InputError, nearest

PACKAGE = Path(__file__).resolve().parent
HOME = PACKAGE.parent if (PACKAGE.parent / "launch" / "recipes").is_dir() else PACKAGE
LAUNCH, DS_CONFIGS = HOME / "launch", HOME / "ds_configs"
RECIPES = LAUNCH / "recipes"


def own_version() -> str:
    """vltrain's version, also of a checkout that is run without having been installed."""
    try:
        return importlib.metadata.version("vltrain")
    except importlib.metadata.PackageNotFoundError:
        setup = configparser.ConfigParser()
        setup.read(HOME / "setup.cfg")
        return setup.get("metadata", "version", fallback="unknown")


def find_recipe(name: str, where: str = "recipe", near: Path = Path()) -> Path:
    """The file of a recipe or table, or the row `FILE#ROW` of one.

    Args:
        name: a file (which wins), or the name of one of launch/recipes, with or without .yaml.
        where: what named it, for errors.
        near: the folder that relative paths are seen from.

    Raises: InputError for an unknown name. A path that is not there is returned as it is: whoever reads it says so.
    """
    file, mark, row = name.rpartition("#")
    if not mark or (near / name).is_file():
        file, mark, row = name, "", ""
    found = _find(file, ".yaml", RECIPES, where, "recipe", near)
    return Path(f"{found}{mark}{row}")


def find_ds_json(name: str) -> Path:
    """A DeepSpeed JSON file, or one of ds_configs by its name; as `find_recipe`."""
    return _find(name, ".json", DS_CONFIGS, "--ds", "DeepSpeed JSON", Path())


def _find(name: str, suffix: str, folder: Path, where: str, kind: str, near: Path) -> Path:
    path = near / name
    known = {entry.stem: entry for entry in folder.glob(f"*{suffix}")}
    stem = Path(name).name.removesuffix(suffix)
    if path.is_file():
        return path
    if Path(name).name != name:
        if stem in known:
            raise InputError(
                f"{where}: '{name}': no such file; {stem} is the name of a {kind} that comes with vltrain: name "
                "it without a path"
            )
        return path
    if stem not in known:
        raise InputError(
            f"{where}: '{name}': no such file, and no {kind} of that name in {folder}; {nearest(stem, known)}"
        )
    return known[stem]
