"""Training: the loop, its optimizer, checkpoints and monitoring. Only `engine` and
`cpu_adam` import deepspeed.

The package is callable, since `vltrain.train(recipe)` and `import vltrain.train.checkpoints.checkpoint` want the same
name: see `vltrain.api.train`.

Imports: errors, console, files, shipped, batch, config, distributed, ops, data, models, metrics, evaluate, receipts,
    memory.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    def __call__(
        self, recipe: str | Path, *, ds: str | Path | None = None, ranks: int | str | None = None, **settings: Any
    ) -> Path:
        return importlib.import_module("vltrain.api").train(recipe, ds=ds, ranks=ranks, **settings)


sys.modules[__name__].__class__ = _Train
