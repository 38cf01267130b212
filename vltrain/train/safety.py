"""What keeps a run from harm, behind one object: the guard that judges losses, the watchdog that names a rank that
hangs, times by which a slow rank is named, and leaving in time when a scheduler asks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from vltrain.batch import Batch
from vltrain.config.schema import TrainConfig
from vltrain.distributed.preemption import Preemption
from vltrain.distributed.stragglers import WorkTimes, slowness, straggler
from vltrain.distributed.watchdog import Watchdog
from vltrain.memory.out_of_memory import oom_context
from vltrain.train.guard import LossGuard, StepReading

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunSafety:
    """Of one rank. Made by `make_safety`."""

    rank: int
    world_size: int
    device: torch.device
    log_every_steps: int
    guard: LossGuard
    watchdog: Watchdog
    preemption: Preemption

    def __post_init__(self) -> None:
        self._work = WorkTimes(device=self.device)
        self._waits_since = time.perf_counter()

    def watching(self) -> AbstractContextManager[None]:
        """A rank that hangs inside the block is named, and the run ended."""
        return self.watchdog.watching()

    def training(self) -> AbstractContextManager[None]:
        """A signal to leave waits inside the block for a step boundary."""
        return self.preemption.training()

    def at(self, step: int, phase: str, micro_step: int = 0) -> None:
        """The rank has come this far, see `Watchdog.at`."""
        self.watchdog.at(step, phase, micro_step)

    def waits_for_data(self) -> None:
        """From here on."""
        self._waits_since = time.perf_counter()

    def fetched(self) -> float:
        """A step's batches have come. Returns the seconds waited."""
        waited = time.perf_counter() - self._waits_since
        self._work.fetched(waited)
        return waited

    def forward(self) -> AbstractContextManager[None]:
        """Times a forward."""
        return self._work.forward()

    def oom_context(self, batch: Batch, step: int) -> AbstractContextManager[None]:
        """Where memory runs out inside the block, the pack is named."""
        return oom_context(batch, step=step, rank=self.rank)

    def stragglers(self, step: int) -> dict[str, float]:
        """Warns of a rank that makes the others wait. On logging steps of several ranks returns how slow the slowest
        is, else {}. A collective."""
        if self.world_size == 1 or (step + 1) % self.log_every_steps:
            return {}
        times = self._work.gather()
        found = straggler(times)
        if found is not None and self.rank == 0:
            logger.warning("step %d: %s", step, found)
        return {"speed/slowest_rank_over_median": slowness(times)}

    def asks_to_leave(self) -> bool:
        """Whether all ranks leave after this step, see `Preemption.agreed`. A collective."""
        return self.preemption.agreed(self.device)

    def leaves_alone(self) -> bool:
        """Whether a rank that is alone in its run, and waits for data, is to leave: it stands at a step boundary.
        Several have to come to one together."""
        return self.world_size == 1 and self.preemption.is_asked

    def leave(self, steps_done: int) -> NoReturn:
        """Raises Preempted."""
        self.preemption.leave(steps_done)

    def saving(self) -> AbstractContextManager[None]:
        """Inside the block a signal cuts nothing short."""
        return self.preemption.saving()

    def evaluating(self) -> AbstractContextManager[None]:
        """Everything is saved: inside the block a signal ends the rank at once."""
        return self.preemption.nothing_to_lose()


def make_safety(
    train: TrainConfig,
    folder: Path,
    *,
    world: tuple[int, int],
    device: torch.device,
    report: Callable[[StepReading], None],
    guard_state: dict[str, Any] | None,
    preemption: Preemption,
) -> RunSafety:
    """As the recipe wants it.

    Args:
        folder: the run's.
        world: (rank, world size).
        report, guard_state: see `LossGuard`.
        preemption: of the program.
    """
    rank, world_size = world
    minutes = train.hang_timeout_minutes
    timeout = 60 * minutes if minutes else None
    return RunSafety(
        rank=rank,
        world_size=world_size,
        device=device,
        log_every_steps=train.log_every_steps,
        guard=LossGuard(
            report, policy=train.on_bad_loss, spike_factor=train.spike_factor, folder=folder, state=guard_state
        ),
        watchdog=Watchdog(folder, rank=rank, world_size=world_size, timeout_seconds=timeout),
        preemption=preemption,
    )
