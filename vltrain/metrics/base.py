"""What a logger of metrics is. A new one is a class in a file of its own beside this one, and a line in
`vltrain.metrics.table`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The run whose metrics are logged.

    Args:
        folder: the run's; what a logger keeps locally goes below it.
        settings: the resolved recipe, nested, for the logger's table of hyperparameters.
        first_step: where a training run goes on: what earlier lives logged at or after this step is dropped where the
            logger can. None: nothing is dropped.
    """

    folder: Path
    settings: Mapping[str, Any]
    first_step: int | None = None


class MetricLogger(Protocol):
    """Where metrics go. Called on rank 0 only, by one thread. Steps need not come in order: an evaluation may belong to
    an earlier one. A call may raise anything: the logger is left out then (`vltrain.metrics.loggers`)."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, `train/loss`; the part before the slash groups them."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in Markdown."""
        ...

    def images(self, tag: str, images: Mapping[str, Image.Image], step: int) -> None:
        """RGB pictures, of any size each; a name shows one thing over the steps."""
        ...

    def figure(self, tag: str, figure: Figure, step: int) -> None: ...

    def flush(self) -> None:
        """What was logged so far survives a crash of this process."""
        ...

    def close(self) -> None: ...


class LoggerKind(Protocol):
    """The class of a logger, an entry of the table."""

    package: str
    """What it imports, in its `__init__` and not before."""
    install: str
    """The command that installs it."""

    def __call__(self, run: RunContext) -> MetricLogger:
        """Opens it. Raises: InputError for what ends the run before its first step; anything else leaves it out."""
        ...
