"""Weights & Biases. Its own environment variables say where to: WANDB_PROJECT (else `vltrain`), WANDB_ENTITY,
WANDB_MODE=offline for machines without network, whose files `wandb sync RUN/wandb/offline-*` uploads later.

A run that goes on is the same run there: its id is kept in the run's folder. Steps are an axis of our own, since W&B's
must not go back: what is trained again after an interruption is there twice, with the same values.
"""

from __future__ import annotations

import html
import io
import os
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from vltrain.distributed.signals import block_signals_in_workers
from vltrain.files.atomic import write_whole
from vltrain.metrics.base import RunContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "vltrain"
STEP = "step"


class WandbLogger:
    """A run of W&B, with its files in `RUN/wandb`."""

    package: ClassVar[str] = "wandb"
    install: ClassVar[str] = "pip install 'vltrain[wandb]'"

    def __init__(self, run: RunContext) -> None:
        import wandb

        self._wandb = wandb
        kept = run.folder / "wandb" / "run_id"
        if not kept.exists():
            write_whole(kept, uuid.uuid4().hex)
        # Its service process has to go on until the run has saved, whatever a scheduler or a terminal signals.
        with block_signals_in_workers():
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
                id=kept.read_text(),
                resume="allow",
                dir=str(run.folder),
                config=dict(run.settings),
                # It would catch stdout for its page; the run's log is in the run's folder.
                settings=wandb.Settings(console="off", silent=True),
            )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def text(self, tag: str, text: str, step: int) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{html.escape(text)}</pre>"), STEP: step})

    def images(self, tag: str, images: Mapping[str, Image.Image], step: int) -> None:
        self._run.log({tag: [self._wandb.Image(image, caption=name) for name, image in images.items()], STEP: step})

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        self._run.log({tag: self._wandb.Image(Image.open(drawn)), STEP: step})

    def flush(self) -> None:
        """Nothing: another process has it already."""

    def close(self) -> None:
        self._run.finish()
