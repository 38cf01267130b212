"""Judges the loss of every step, and names the samples behind a bad one: one that is NaN or Inf, or far above those
before.

`stop` ends the run before anything of a bad step is saved. The check is one step late: loss and gradient norm of step k
are summed over the ranks and copied to the host without waiting, and read when step k+1 has been queued, so neither the
device nor the host waits. A checkpoint reads what is pending first, so none holds a poisoned weight.

`skip` drops the update of a bad step, writes its samples into the run's quarantine.jsonl and goes on. To know in time,
it reads each loss before the optimizer's step: the host waits for the device once a step. Every rank reads the same
sum, so all decide alike; what the decision depends on is in the checkpoint, so a resumed run decides alike too. The
samples stay in the packs: where they come again, they are judged again.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vltrain.distributed.readback import HostCopy
from vltrain.errors import InputError
from vltrain.files.appended import AppendedFile
from vltrain.metrics.step_log import plain_number
from vltrain.ops.transfer import to_device
from vltrain.receipts.receipt import WORDS, samples_text

QUARANTINE = "quarantine.jsonl"
WINDOW_STEPS, LEAST_STEPS = 50, 10  # a spike stands out from the mean of the last losses, of so many at least
MAX_SKIPPED_IN_A_ROW = 10
NAMED_SAMPLES = 8


@dataclass(kw_only=True)
class StepResult:
    """What one rank knows of a step.

    losses: per micro-step the summed loss [fp32 scalars]; segment_losses: per micro-step [S] of the batch's samples.
    segment_labels: per micro-step int64 [S], label tokens of the batch's samples.
    places: per micro-step where its samples begin among the step's `num_samples`, see `StepPlan`; None of a filler.
    num_label_tokens: of the whole step; own_label_tokens: of this rank's batches.
    samples: fingerprint of this rank's samples, see `vltrain.receipts.receipt.fingerprint`.
    applied: whether the optimizer took the step.
    frozen: digests of the frozen weights behind it, where they were taken.
    """

    step: int
    losses: list[torch.Tensor]
    segment_losses: list[torch.Tensor]
    segment_labels: list[torch.Tensor]
    sample_ids: list[tuple[str, ...]]
    places: list[int | None]
    num_samples: int
    num_label_tokens: int
    own_label_tokens: int
    samples: tuple[int, ...]
    grad_norm: float | torch.Tensor = 0.0
    lr: float = 0.0
    applied: bool = True
    frozen: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What all ranks together know of a step, read on the host.

    loss: mean per label token; label_tokens, samples: counted by the ranks in what they trained on, `samples` as a
    receipt writes it.
    sample_losses: fp32 [samples of the step], mean loss per label token of each, in the history's order.
    skipped: its update was not applied; frozen: see `StepResult`.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    label_tokens: int
    samples: str
    sample_losses: np.ndarray
    skipped: bool = False
    frozen: dict[str, str] | None = None


class LossGuard:
    """Holds the newest step's result until it can be read for free.

    Args:
        report: called with each step's reading, in order of steps.
        policy: `stop` or `skip`, see the module.
        spike_factor: a loss of more than so many times the mean of the last steps' is bad; None: only one that is not
            finite.
        folder: where rank 0 writes the quarantine; None: nowhere.
        state: of `state()`, from a checkpoint.
    """

    def __init__(
        self,
        report: Callable[[StepReading], None],
        *,
        policy: str = "stop",
        spike_factor: float | None = None,
        folder: Path | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.skips = policy == "skip"
        self._report, self._spike_factor, self._folder = report, spike_factor, folder
        self._pending: tuple[StepResult, HostCopy] | None = None
        self._grad_norm: HostCopy | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.num_skipped = self._skipped_in_a_row = 0
        if state is not None:
            self._recent.extend(map(float.fromhex, state["recent"]))
            self.num_skipped, self._skipped_in_a_row = state["num_skipped"], state["skipped_in_a_row"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, nothing pending."""
        recent = [value.hex() for value in self._recent]
        return {"recent": recent, "num_skipped": self.num_skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def allows(self, result: StepResult) -> bool:
        """Whether the optimizer may take a step, before it does. Under `stop` always, and without waiting. A
        collective."""
        if not self.skips:
            return True
        assert self._pending is None, "a step's loss was never taken note of"
        self._begin(result)
        return self._fault(self._read_loss()) is None

    def push(self, result: StepResult) -> None:
        """Takes note of a step that was done. Under `stop` the one before is read now. A collective."""
        grad_norm = HostCopy(torch.as_tensor(result.grad_norm))
        if self.skips:
            self._grad_norm = grad_norm
            self.flush()
        else:
            self.flush()
            self._begin(result)
            self._grad_norm = grad_norm

    def _begin(self, result: StepResult) -> None:
        total = _shared(result)
        work = dist.all_reduce(total, async_op=True) if dist.get_world_size() > 1 else None
        self._pending = (result, HostCopy(total, work))

    def _read_loss(self) -> float:
        assert self._pending is not None
        return float(self._pending[1].read()[0])

    def _fault(self, loss: float) -> str | None:
        """What is wrong with a loss."""
        if not math.isfinite(loss):
            return "is NaN or Inf"
        if self._spike_factor is None or len(self._recent) < LEAST_STEPS:
            return None
        mean = sum(self._recent) / len(self._recent)
        return (
            f"is {loss / mean:.1f} times the mean of the last {len(self._recent)} steps"
            if loss > self._spike_factor * mean
            else None
        )

    def flush(self) -> None:
        """Reads the pending result.

        Raises: InputError on every rank if its loss or gradient is bad: under `skip` only where that is so step after
        step.
        """
        if self._pending is None:
            return
        loss = self._read_loss()
        assert self._grad_norm is not None, "a step's gradient norm was never taken note of"
        (result, total), self._pending = self._pending, None
        numbers = total.read()
        _, label_tokens, *samples = numbers[: 2 + WORDS].tolist()
        grad_norm = float(self._grad_norm.read())
        fault = self._fault(loss)
        if fault is None and not (math.isfinite(grad_norm) and result.applied):
            fault = "is finite, the gradient is not"
        if fault is None:
            self._recent.append(loss)
            self._skipped_in_a_row = 0
        else:
            self._handle(result, loss, grad_norm, fault)
        counts = {"label_tokens": int(label_tokens), "samples": samples_text(samples), "skipped": not result.applied}
        found = {"sample_losses": numbers[2 + WORDS :].float().numpy(), "frozen": result.frozen}
        reading = {"step": result.step, "loss": loss, "grad_norm": grad_norm, "lr": result.lr}
        self._report(StepReading(**reading, **counts, **found))

    def _handle(self, result: StepResult, loss: float, grad_norm: float, fault: str) -> None:
        everything = _losses_of_samples(result)
        suspects = suspected(everything)
        named = ", ".join(f"{name} {value:.3g}" for name, value in suspects[:NAMED_SAMPLES])
        more = f" and {len(suspects) - NAMED_SAMPLES} more" if len(suspects) > NAMED_SAMPLES else ""
        kind = "not finite" if suspects and not math.isfinite(suspects[0][1]) else "largest"
        found = f"step {result.step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}: the loss {fault}"
        what = f"{found}; per label token {kind}: sample(s) {named}{more}"
        replay = f"vltrain check replay {self._folder or 'RUN'} --step {result.step}"
        if not self.skips:
            raise InputError(
                f"{what}. Nothing was saved since; look at these samples ({replay}), lower optim.lr, set "
                "optim.clip, train in fp32 "
                "(train.precision), or go past them (train.on_bad_loss skip), then resume with --resume auto"
            )
        assert not result.applied
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise InputError(
                f"{what}. Step after step: {self._skipped_in_a_row} in a row were skipped; lower optim.lr or "
                "set optim.clip"
            )
        if dist.get_rank() == 0 and self._folder is not None:
            losses = [{"id": name, "loss": plain_number(value)} for name, value in suspects]
            line = {
                "step": result.step,
                "loss": plain_number(loss),
                "reason": f"the loss {fault}",
                "replay": replay,
                "samples": losses,
            }
            with closing(AppendedFile(self._folder / QUARANTINE)) as file:
                file.write(json.dumps(line) + "\n")


def _shared(result: StepResult) -> torch.Tensor:
    """This rank's part of what is summed over ranks, fp64: mean loss, label tokens, fingerprint of the samples, each
    sample's loss."""
    loss = torch.stack(result.losses).sum() / result.num_label_tokens
    counted = to_device(torch.tensor([result.own_label_tokens, *result.samples], dtype=torch.float64), loss.device)
    return torch.cat([loss.double().reshape(1), counted, _sample_losses(result, loss.device)])


def _sample_losses(result: StepResult, device: torch.device) -> torch.Tensor:
    """fp64 [num_samples], the mean loss per label token of each sample of this rank in its place, NaN of one without
    labels; 0 elsewhere."""
    everyone = torch.zeros(result.num_samples, dtype=torch.float64, device=device)
    micro_steps = zip(result.places, result.segment_losses, result.segment_labels, strict=True)
    own = [(place, losses, labels) for place, losses, labels in micro_steps if place is not None]
    if not own:
        return everyone
    places = torch.cat([torch.arange(place, place + len(labels)) for place, _, labels in own])
    labels = to_device(torch.cat([labels for _, _, labels in own]), device)
    losses = torch.cat([losses for _, losses, _ in own]).double() / labels
    return everyone.index_copy_(0, to_device(places, device), losses)


def own_losses(result: StepResult) -> list[tuple[str, float]]:
    """(id, mean loss per label token) of each sample that this rank trained on."""
    return [
        (name, value / count)
        for names, values, counts in zip(result.sample_ids, result.segment_losses, result.segment_labels, strict=True)
        for name, value, count in zip(names, values.tolist(), counts.tolist(), strict=True)
        if count
    ]


def _losses_of_samples(result: StepResult) -> list[tuple[str, float]]:
    """Those of all ranks, on every rank, so that all say the same. A collective."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own_losses(result))
    return [pair for part in gathered for pair in part]


def suspected(losses: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The samples whose loss is not finite, or if there is none those with the largest."""
    culprits = [pair for pair in losses if not math.isfinite(pair[1])]
    return culprits or sorted(losses, key=lambda pair: pair[1], reverse=True)[:NAMED_SAMPLES]
