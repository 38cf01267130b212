"""Small tensors from the host to the device without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`. For CUDA it is pinned first: from other memory the copy would wait for all that the
    device has to do before it."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
