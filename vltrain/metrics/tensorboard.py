"""TensorBoard: event files in the run's folder.

Their writer has a thread: on a full disk the folder is named in one line, and no thread prints a traceback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vltrain.errors import InputError
from vltrain.metrics.base import RunContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "tensorboard"  # of a run


def _chart(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


LAYOUT = {
    "loss and accuracy": {
        "loss": _chart(r"train/loss$"),
        "accuracy": _chart(r"eval/(?!.*_by/)([^/]+/)?[^/]+/(?!failed_share$)[^/]+$"),
        "accuracy by category": _chart(r"eval/([^/]+/)?[^/]+/[^/]+_by/.+"),
        "loss by category": _chart(r"train/[^/]+_by[^/]*/.+"),
        "gradient norm": _chart(r"train/grad_norm$"),
        "learning rate": _chart(r"train/lr$"),
    },
    "speed": {
        "useful tokens per second": _chart(r"speed/useful_tokens_per_second$"),
        "samples per second": _chart(r"speed/samples_per_second$"),
        "MFU": _chart(r"speed/mfu$"),
        "slowest rank over median": _chart(r"speed/slowest_rank_over_median$"),
    },
    "data": {
        "per step": _chart(r"data/.+_per_step$"),
        "share of padding, of time waiting for data": _chart(r"speed/(padding|waiting_for_data)_share$"),
        "epoch": _chart(r"data/epoch$"),
        "passes over each set": _chart(r"data/passes_of_set/.+"),
    },
    "memory": {"peak, GiB": _chart(r"memory/peak_gib$")},
    "adapters": {
        "norm of the trained weights": _chart(r"adapters/norm/.+"),
        "AdaLoRA: mean rank": _chart(r"adalora/rank/.+"),
        "AdaLoRA: directions left": _chart(r"adalora/directions$"),
    },
    "checks": {
        "skipped updates": _chart(r"checks/skipped_updates$"),
        "answers in which nothing was found": _chart(r"eval/([^/]+/)?[^/]+/failed_share$"),
    },
}
"""What the tab "custom scalars" shows: groups of charts, each of the tags that its patterns match. One without a tag
stays empty."""
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
        self._call(lambda: self._writer.add_custom_scalars(LAYOUT))
        assert self._writer.file_writer is not None
        events = self._writer.file_writer.event_writer
        for name in ("add_event", "flush", "close"):
            setattr(events, name, self._naming_folder(getattr(events, name)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)

    def images(self, tag: str, images: Mapping[str, Image.Image], step: int) -> None:
        """Each under `tag`/NAME, so that the slider shows one thing over the steps."""
        for name, image in images.items():
            self._writer.add_image(f"{tag}/{name}", np.asarray(image), step, dataformats="HWC")

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
