"""`tests.train.worker`, in a process where `torch.is_autocast_enabled()` without a device answers as on CUDA.

Without a device it answers for CUDA, so that on CPU ranks DeepSpeed never sees our autocast; on CUDA it does, and would switch it off. Here it
answers for the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.train import worker
from vltrain.train.engine import init_distributed, shutdown_distributed

of_device = torch.is_autocast_enabled


def as_on_cuda(device: str | None = None) -> bool:
    return of_device("cpu" if device is None else device)


def main(scenarios: str) -> None:
    torch.set_num_threads(1)
    rank, world_size = init_distributed()
    for scenario in json.loads(Path(scenarios).read_text()):
        torch.is_autocast_enabled = as_on_cuda if scenario["flag"] else of_device
        worker.run(scenario, rank, world_size)
    shutdown_distributed()
