"""All loggers of a run behind the protocol of one. Made once a run and handed to whoever reports.

A tracker is worth less than the run it watches: one that fails (no network, a full disk, a defect of its library) is
left out from then on, which is said once, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from vltrain.errors import InputError
from vltrain.metrics.base import MetricLogger, RunContext
from vltrain.metrics.table import LOGGERS, require_loggers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


class Loggers:
    """Hands everything on to each of `loggers`, by name, that has not failed. With none, nothing is logged: what ranks
    other than 0 have."""

    def __init__(self, loggers: Mapping[str, MetricLogger] | None = None) -> None:
        self._working = dict(loggers or {})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda one: one.scalars(values, step))

    def text(self, tag: str, text: str, step: int) -> None:
        self._each(lambda one: one.text(tag, text, step))

    def images(self, tag: str, images: Mapping[str, Image.Image], step: int) -> None:
        self._each(lambda one: one.images(tag, images, step))

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._each(lambda one: one.figure(tag, figure, step))

    def flush(self) -> None:
        self._each(lambda one: one.flush())

    def close(self) -> None:
        self._each(lambda one: one.close())
        self._working.clear()

    def _each(self, call: Callable[[MetricLogger], None]) -> None:
        for name, one in tuple(self._working.items()):
            try:
                call(one)
            except Exception as error:
                del self._working[name]
                _warn(name, error)


def open_loggers(names: Sequence[str], run: RunContext) -> Loggers:
    """Opens the named loggers for a run, on rank 0.

    Raises:
        InputError: as `require_loggers`, and where a logger's folder cannot be written.
    """
    require_loggers(names)
    opened: dict[str, MetricLogger] = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name](run)
        except InputError:
            raise
        except Exception as error:
            _warn(name, error)
    return Loggers(opened)


def _warn(name: str, error: Exception) -> None:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.warning("train.loggers: %s failed (%s): it gets nothing more, the run continues without it", name, said)
