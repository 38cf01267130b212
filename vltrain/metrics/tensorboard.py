"""TensorBoard: event files in the run's folder.

Their writer has a thread: on a full disk the folder is named in one line, and no thread prints a traceback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vltrain.errors import InputError
from vltrain.metrics.base import RunContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "tensorboard"  # of a run
_WRITERS_THREAD = "_AsyncWriterThread"  # tensorboard's; what ends it is raised again by the next call of the writer


class TensorBoardLogger:
    """Event files in `RUN/tensorboard`. Every call raises InputError where they cannot be written."""

    package: ClassVar[str] = "tensorboard"
    install: ClassVar[str] = "pip install tensorboard"

    def __init__(self, run: RunContext) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second

        _keep_thread_quiet()
        self._folder = run.folder / FOLDER
        self._writer = self._call(lambda: SummaryWriter(str(self._folder), purge_step=run.first_step))
        assert self._writer.file_writer is not None
        events = self._writer.file_writer.event_writer
        for name in ("add_event", "flush", "close"):
            setattr(events, name, self._naming_folder(getattr(events, name)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)

    def images(self, tag: str, images: Sequence[Image.Image], step: int) -> None:
        """Each under `tag`/NUMBER, so that the slider shows one place in the list over the steps."""
        for number, image in enumerate(images):
            self._writer.add_image(f"{tag}/{number:02d}", np.asarray(image), step, dataformats="HWC")

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._writer.add_figure(tag, figure, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _naming_folder(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: self._call(lambda: call(*arguments))

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written ({error.strerror or error}); free disk space or fix its permissions"
            ) from None


def _keep_thread_quiet() -> None:
    before = threading.excepthook
    if getattr(before, "quiet_events", False):
        return

    def hook(raised: threading.ExceptHookArgs) -> None:
        is_writers = type(raised.thread).__name__ == _WRITERS_THREAD
        if not (is_writers and issubclass(raised.exc_type, OSError)):
            before(raised)

    hook.quiet_events = True  # type: ignore[attr-defined]
    threading.excepthook = hook
