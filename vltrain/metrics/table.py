"""The loggers by the names that `train.loggers` knows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from vltrain.errors import InputError, nearest
from vltrain.metrics.base import LoggerKind
from vltrain.metrics.mlflow import MlflowLogger
from vltrain.metrics.tensorboard import TensorBoardLogger
from vltrain.metrics.wandb import WandbLogger

LOGGERS: dict[str, LoggerKind] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def require_loggers(names: Sequence[str]) -> None:
    """Raises InputError for an unknown name, one that is there twice, and a package that is not installed."""
    for place, name in enumerate(names):
        if name not in LOGGERS:
            raise InputError(f"train.loggers: unknown logger '{name}'; {nearest(name, LOGGERS)}")
        if name in names[:place]:
            raise InputError(f"train.loggers: '{name}' is there twice; name each logger once")
        kind = LOGGERS[name]
        if importlib.util.find_spec(kind.package) is None:
            raise InputError(
                f"train.loggers: {name} needs the package {kind.package}, which is not installed: {kind.install}; "
                "or leave it out"
            )
