"""The recipes that come with the checkout, by name."""

from __future__ import annotations

import os
from pathlib import Path

from vltrain.errors import InputError, nearest

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as a bare name of launch/recipes. Raises InputError for an unknown bare name."""
    if os.path.exists(name) or Path(name).name != name or ".yaml" in name:
        return Path(name)
    known = [path.stem for path in RECIPES.glob("*.yaml")]
    if name not in known:
        raise InputError(f"recipe '{name}': no such file, and none of that name in {RECIPES}; {nearest(name, known)}")
    return RECIPES / f"{name}.yaml"
