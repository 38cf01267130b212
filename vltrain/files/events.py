"""TensorBoard's event files, whose writer has a thread: on a full disk the folder is named in one line, and no thread
prints a traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from vltrain.errors import InputError

_WRITERS_THREAD = "_AsyncWriterThread"  # tensorboard's; what ends it is raised again by the next call of the writer


class EventWriter(SummaryWriter):
    """A SummaryWriter whose calls raise InputError where its folder cannot be written.

    Args:
        purge_step: what earlier writers said of this step and later ones is dropped.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        _keep_thread_quiet()
        self._folder = folder
        self._call(lambda: super(EventWriter, self).__init__(str(folder), purge_step=purge_step))
        assert self.file_writer is not None
        events = self.file_writer.event_writer
        for name in ("add_event", "flush", "close"):
            setattr(events, name, self._telling(getattr(events, name)))

    def _telling(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: self._call(lambda: call(*arguments))

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written ({error.strerror or error}); make room or give permission"
            ) from None


def _keep_thread_quiet() -> None:
    before = threading.excepthook
    if getattr(before, "quiet_events", False):
        return

    def hook(told: threading.ExceptHookArgs) -> None:
        is_writers = type(told.thread).__name__ == _WRITERS_THREAD
        if not (is_writers and issubclass(told.exc_type, OSError)):
            before(told)

    hook.quiet_events = True  # type: ignore[attr-defined]
    threading.excepthook = hook
