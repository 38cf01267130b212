"""Names the rank that makes the others wait, from what each spends on its own work: fetching batches and the forwards.

The backward and the optimizer's step are left out, since ranks wait for each other there and all take equally long. On
a GPU the forwards are timed by events on the device. The ranks' times are gathered on logging steps only; on those the
host waits for the device. Under ZeRO-3 a forward gathers weights, so a slow rank shows less clearly there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

FACTOR, LEAST_SECONDS = 1.5, 0.02  # over the median rank, and a step, before a rank counts as a straggler


@dataclass(kw_only=True)
class WorkTimes:
    """Seconds of this rank since the last gathering."""

    device: torch.device
    fetching: float = 0.0
    computing: float = 0.0
    num_steps: int = 0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Times a forward."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self.computing += time.perf_counter() - began
            return
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    def fetched(self, seconds: float) -> None:
        self.fetching += seconds
        self.num_steps += 1

    def gather(self) -> list[tuple[float, float]]:
        """(fetching, computing) seconds a step of each rank, on every rank; begins anew. A collective, for logging
        steps."""
        for first, last in self._events:
            last.synchronize()
            self.computing += first.elapsed_time(last) / 1000
        steps = max(self.num_steps, 1)
        own = torch.tensor([self.fetching / steps, self.computing / steps], dtype=torch.float64, device=self.device)
        self.fetching, self.computing, self.num_steps = 0.0, 0.0, 0
        self._events.clear()
        if dist.get_world_size() == 1:
            return [tuple(own.tolist())]
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        return [tuple(one.tolist()) for one in every]


def slowness(times: list[tuple[float, float]]) -> float:
    """The slowest rank's time as a multiple of the median rank's."""
    totals = sorted(map(sum, times))
    return totals[-1] / max(totals[(len(totals) - 1) // 2], 1e-9)


def straggler(times: list[tuple[float, float]]) -> str | None:
    """A sentence about the slowest rank, if it is that slow."""
    totals = [fetching + computing for fetching, computing in times]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    median = sorted(totals)[(len(totals) - 1) // 2]
    if totals[slowest] < FACTOR * median or totals[slowest] - median < LEAST_SECONDS:
        return None
    fetching, computing = times[slowest]
    return (
        f"rank {slowest} makes the others wait: {totals[slowest]:.2f} s a step, the median rank {median:.2f} s; "
        f"fetching {fetching:.2f} s, "
        f"forwards {computing:.2f} s. Slow fetching: more data.workers, or its disk; slow forwards: its device, "
        "or another process on it"
    )
