"""What a run says while it runs: metrics for its loggers, a line per step in `log.jsonl`, how far it is
(`vltrain.console.Progress`). Written by rank 0 alone.

Losses and gradient norms come one step late and as plain numbers (see `vltrain.train.guard`): nothing here reads the
device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from vltrain.console import Progress
from vltrain.data.plan import StepPlan
from vltrain.distributed.hardware import peak_memory_bytes
from vltrain.files.appended import AppendedFile
from vltrain.metrics.base import MetricLogger
from vltrain.metrics.step_log import LOG, plain_number, truncate_jsonl
from vltrain.models.flops import Flops

_NONE: Mapping[str, float] = {}


class Monitor:
    """Rank 0's view of the run. On other ranks every method does nothing.

    Args:
        folder: the run's folder.
        loggers: get the metrics; closed with this.
        first_step: what earlier lives of the run wrote at or after this step is dropped, since it is done again.
        flops: model FLOPs by kind, for MFU.
        peak_flops: of all ranks together, FLOP/s.
    """

    headline: str
    """Of the newest evaluation."""

    def __init__(
        self,
        folder: Path,
        loggers: MetricLogger,
        *,
        active: bool,
        first_step: int,
        num_steps: int,
        log_every_steps: int,
        flops: Flops,
        peak_flops: float,
    ) -> None:
        self.active = active
        if not active:
            return
        self._flops, self._peak_flops = flops, peak_flops
        self._log_every_steps = log_every_steps
        self._loggers = loggers
        self._log = _reopen_log(folder / LOG, first_step)
        self._progress = Progress(total=num_steps, initial=first_step, title="train", unit="step")
        self.last_loss: float | None = None
        self.headline = ""
        self._rates = ""
        self._reset(time.perf_counter())

    def _reset(self, now: float) -> None:
        self._since, self._waited, self._model_flops = now, 0.0, 0.0
        self._samples = self._tokens = self._positions = 0
        self._steps = self._images = self._label_tokens = 0

    def fetched(self, plan: StepPlan, waited_seconds: float, num_positions: int) -> None:
        """A step's batches have arrived. `num_positions`: tokens that all ranks compute on, fillers included."""
        if not self.active:
            return
        self._waited += waited_seconds
        self._steps += 1
        self._images += plan.num_images
        self._label_tokens += plan.num_label_tokens
        self._samples += plan.num_samples
        self._tokens += plan.num_tokens
        self._positions += num_positions
        self._model_flops += self._flops.of(
            num_tokens=plan.num_tokens,
            num_pairs=plan.num_pairs,
            num_images=plan.sized_images,
            num_label_tokens=plan.num_label_tokens,
        )

    def stepped(self, step: int, lr: float) -> None:
        """The optimizer has stepped; at logging steps the rates since the last one are written."""
        if not self.active:
            return
        self._loggers.scalars({"train/lr": lr}, step)
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        if (step + 1) % self._log_every_steps:
            self._progress.update(1, self._figures(self._rates or f"{self._tokens / seconds:,.0f} tokens/s"))
            return
        rates = {
            "speed/useful_tokens_per_second": self._tokens / seconds,
            "speed/samples_per_second": self._samples / seconds,
            "speed/padding_share": 1 - self._tokens / max(self._positions, 1),
            "speed/waiting_for_data_share": self._waited / seconds,
            "speed/mfu": self._model_flops / seconds / self._peak_flops,
            "data/samples_per_step": self._samples / max(self._steps, 1),
            "data/images_per_step": self._images / max(self._steps, 1),
            "data/label_tokens_per_step": self._label_tokens / max(self._steps, 1),
            "memory/peak_gib": peak_memory_bytes() / 1024**3,
        }
        self._loggers.scalars(rates, step)
        self._rates = f"{rates['speed/useful_tokens_per_second']:,.0f} tokens/s, MFU {rates['speed/mfu']:.2f}"
        self._progress.update(1, self._figures(self._rates))
        self._reset(now)

    def _figures(self, rates: str) -> str:
        return rates if self.last_loss is None else f"loss {self.last_loss:.4f}, {rates}"

    def loss(self, step: int, loss: float, grad_norm: float, lr: float, more: Mapping[str, float] = _NONE) -> None:
        """The global mean loss per label token of a step, and its gradient's norm. `more`: figures of the log alone."""
        if not self.active:
            return
        self._loggers.scalars({"train/loss": loss, "train/grad_norm": grad_norm}, step)
        told = {"loss": plain_number(loss), "grad_norm": plain_number(grad_norm), "lr": lr}
        further = {name: plain_number(value) for name, value in more.items()}
        self._log.write(json.dumps({"step": step, **told, **further}) + "\n")
        self.last_loss = loss

    def pause(self) -> None:
        """Time spent on evaluation or saving is not training time: the interval's figures start anew."""
        if self.active:
            self._loggers.flush()
            self._reset(time.perf_counter())

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.active and values:
            self._loggers.scalars(values, step)

    def close(self) -> None:
        if self.active:
            self._progress.close()
            self._log.close()
            self._loggers.close()


def _reopen_log(path: Path, first_step: int) -> AppendedFile:
    """Opens the log for appending, without the lines from `first_step` on (and without a line that a crash cut
    short)."""
    truncate_jsonl(path, first_step)
    return AppendedFile(path)
