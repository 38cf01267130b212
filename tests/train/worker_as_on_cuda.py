"""`tests.train.worker`, with DeepSpeed asking for autocast as it does on CUDA.

`torch.is_autocast_enabled()` without a device answers for CUDA, so that on CPU ranks DeepSpeed never sees an autocast, and on CUDA switches one off that
was entered around its forward. Here it answers for the CPU.
"""

import torch

from tests.train.worker import main

__all__ = ["main"]

_of_device = torch.is_autocast_enabled
torch.is_autocast_enabled = lambda device=None: _of_device("cpu" if device is None else device)
