"""The attack list: see `tests.attacks.attack`."""

import importlib
from pathlib import Path


def load_attacks() -> None:
    """Imports every module of this folder, so that `ATTACKS` is whole."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith(("_", "test_")):
            importlib.import_module(f"tests.attacks.{path.stem}")
