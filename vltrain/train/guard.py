"""Stops a run whose loss is no longer a number, and names the samples, before anything of it is saved.

The check is one step late: the loss of step k is summed over the ranks without waiting, and read when step k+1 has been
queued, so the device never waits for the host. A checkpoint reads what is pending first, so none holds a poisoned weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vltrain.check.receipt import samples_text
from vltrain.errors import InputError


@dataclass(kw_only=True)
class StepResult:
    """What one rank knows of a step it has done.

    losses: per micro-step the summed loss [fp32 scalars]; segment_losses: per micro-step [S] of the batch's samples.
    num_label_tokens: of the whole step; own_label_tokens: of this rank's batches.
    samples: fingerprint of this rank's samples, see `vltrain.check.receipt.fingerprint`.
    """

    step: int
    losses: list[torch.Tensor]
    segment_losses: list[torch.Tensor]
    sample_ids: list[tuple[str, ...]]
    num_label_tokens: int
    own_label_tokens: int
    samples: tuple[int, ...]
    grad_norm: float | torch.Tensor
    lr: float


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What all ranks together know of a step, read on the host.

    loss: mean per label token; label_tokens, samples: counted by the ranks in what they trained on, `samples` as a receipt writes it.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    label_tokens: int
    samples: str


class FiniteGuard:
    """Holds the newest step's result until it can be read for free.

    Args:
        report: called with each step's reading, in order of steps.
    """

    def __init__(self, report: Callable[[StepReading], None]) -> None:
        self._report = report
        self._pending: tuple[StepResult, torch.Tensor, dist.Work | None] | None = None

    def push(self, result: StepResult) -> None:
        """Takes a step's result, after reading the one before. A collective."""
        self.flush()
        total = _shared(result)
        work = dist.all_reduce(total, async_op=True) if dist.get_world_size() > 1 else None
        self._pending = (result, total, work)

    def flush(self) -> None:
        """Reads the pending result. Raises InputError on every rank if its loss or gradient is not finite."""
        if self._pending is None:
            return
        (result, total, work), self._pending = self._pending, None
        if work is not None:
            work.wait()
        loss, label_tokens, *samples = total.tolist()
        grad_norm = float(result.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise InputError(_diagnosis(result, loss, grad_norm))
        told = {"label_tokens": int(label_tokens), "samples": samples_text(samples)}
        self._report(StepReading(step=result.step, loss=loss, grad_norm=grad_norm, lr=result.lr, **told))


def _shared(result: StepResult) -> torch.Tensor:
    """This rank's part of what is summed over ranks, fp64: mean loss, label tokens, fingerprint of the samples."""
    loss = torch.stack(result.losses).sum() / result.num_label_tokens
    counted = torch.tensor([result.own_label_tokens, *result.samples], dtype=torch.float64).to(loss.device, non_blocking=True)
    return torch.cat([loss.double().reshape(1), counted])


def _diagnosis(result: StepResult, loss: float, grad_norm: float) -> str:
    """Names the samples behind a loss that is not finite: gathered from all ranks, so that every rank says the same."""
    losses = [
        (name, value)
        for names, values in zip(result.sample_ids, result.segment_losses, strict=True)
        for name, value in zip(names, values.tolist(), strict=True)
    ]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, losses)
    everything = [pair for part in gathered for pair in part]
    culprits = [name for name, value in everything if not math.isfinite(value)]
    if culprits:
        blame = f"loss of sample(s) {', '.join(culprits[:8])}{f' and {len(culprits) - 8} more' if len(culprits) > 8 else ''} is not finite"
    else:
        largest = sorted(everything, key=lambda pair: pair[1], reverse=True)[:8]
        blame = "every sample's loss is finite, the gradient is not; largest losses: " + ", ".join(f"{name} {value:.3g}" for name, value in largest)
    return (
        f"step {result.step}: loss {loss}, gradient norm {grad_norm}: {blame}. Nothing was saved since; look at these samples, "
        "lower optim.lr, set optim.clip, or train in fp32 (train.precision), then go on with --resume auto"
    )
