"""The ranks among each other: meeting, reducing over gloo and NCCL, and bringing all findings together.

Findings travel over gloo, so that a NCCL that does not work is reported and not waited for.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vltrain.distributed.ranks import join_process_group
from vltrain.doctor.findings import OK, PROBLEM, Finding

GROUP_TIMEOUT = datetime.timedelta(seconds=120)
NCCL_TIMEOUT = datetime.timedelta(seconds=45)
REDUCED_BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
REPEATS = 3


@dataclass(frozen=True)
class Fact:
    """What a rank tells the others of itself before they examine anything together."""

    host: str
    cores: tuple[int, ...]
    gpu: str | None  # the name of its own GPU; None without


def own_fact(gpu: str | None) -> Fact:
    """This rank's."""
    return Fact(socket.gethostname(), tuple(sorted(os.sched_getaffinity(0))), gpu)


def join() -> tuple[int, int]:
    """Joins the group of the launcher's environment over gloo; alone makes one of one rank. Returns (rank, world
    size)."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a NCCL that hangs shall raise, not end the process
    join_process_group("gloo", GROUP_TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leaves the group."""
    dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Each rank's value, on every rank. A collective over gloo."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def one_model(facts: Sequence[Fact]) -> list[Finding]:
    """A problem where the ranks are on GPUs of several models, or some on none."""
    models = sorted({fact.gpu or "no GPU of its own" for fact in facts})
    if len(models) == 1:
        return []
    models = "; ".join(
        f"{model}: ranks "
        f"{', '.join(str(rank) for rank, fact in enumerate(facts) if (fact.gpu or 'no GPU of its own') == model)}"
        for model in models
    )
    do = "choose GPUs of one model (CUDA_VISIBLE_DEVICES, deepspeed --include, sbatch --constraint), as many as ranks"
    return [Finding(status=PROBLEM, what="GPU models", found=models, needed="one model", do=do)]


def all_reduce(backend: str, index: int | None = None) -> Finding:
    """Sums a buffer over all ranks, checks the sum and measures the bus bandwidth: bytes moved by each rank per second,
    2 (n - 1) / n of the buffer.

    Args:
        index: this rank's GPU, for nccl.
    """
    place = torch.device("cpu") if index is None else torch.device("cuda", index)
    if index is not None:
        torch.cuda.set_device(place)  # a thread has a current device of its own
    group = dist.new_group(backend=backend, timeout=NCCL_TIMEOUT) if backend == "nccl" else None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    buffer = torch.empty(REDUCED_BYTES[backend] // 4, device=place)
    best = float("inf")
    for _ in range(1 + REPEATS):
        buffer.fill_(rank + 1)
        _finish(place)
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        _finish(place)
        best = min(best, time.perf_counter() - start)
    what, expected = f"all-reduce ({backend})", world_size * (world_size + 1) / 2
    wrong = int((buffer != expected).sum())
    if wrong:
        return Finding(
            status=PROBLEM,
            what=what,
            found=f"{wrong} of {buffer.numel()} sums over {world_size} ranks are wrong",
            needed="none",
            do="try NCCL_P2P_DISABLE=1; look at the hardware's log (dmesg)",
        )
    if world_size == 1:
        return Finding(
            status=OK,
            what=what,
            found="works in a group of one rank; between ranks: deepspeed launch/doctor.py, or srun",
        )
    bandwidth = 2 * (world_size - 1) / world_size * buffer.nbytes / best / 1e9
    mib = buffer.nbytes >> 20
    return Finding(
        status=OK,
        what=what,
        found=f"{{gb_per_s}} GB/s bus bandwidth over {world_size} ranks ({mib} MiB)",
        numbers={"gb_per_s": bandwidth},
    )


def _finish(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
