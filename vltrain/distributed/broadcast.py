"""Small values that all ranks have to agree on."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from vltrain.distributed.hardware import device


def from_rank_0(value: Any) -> Any:
    """What rank 0 gives, on every rank. A collective."""
    shared = [value]
    dist.broadcast_object_list(shared, device=device())
    return shared[0]
