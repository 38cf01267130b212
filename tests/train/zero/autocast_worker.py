"""`tests.train.worker`, in a process where `torch.is_autocast_enabled()` without a device answers as on CUDA.

Without a device it answers for CUDA, so that on CPU ranks DeepSpeed never sees our autocast; on CUDA it does, and would
switch it off. Here it answers for the CPU.
"""

from __future__ import annotations

import torch

from tests.train import worker

of_device = torch.is_autocast_enabled


def as_on_cuda(device: str | None = None) -> bool:
    return of_device("cpu" if device is None else device)


def run(scenario: dict, rank: int, world_size: int) -> None:
    torch.is_autocast_enabled = as_on_cuda if scenario["flag"] else of_device
    worker.run(scenario, rank, world_size)


def main(scenarios: str) -> None:
    worker.main(scenarios, run)
