"""Numbers from the device to the host, without making either wait for the other until they are read.

Losses, gradient norms and votes are copied as soon as they are known, and read a step later, when they have long
arrived. On CUDA the copy goes to pinned memory on a stream of its own, so that neither a copy nor the all-reduce before
it stands in the way of the next step.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HostCopy:
    """A tensor on its way to the host.

    Args:
        tensor: of any device; nobody writes to it any more.
        work: a collective on it that was started (`async_op=True`), whose result is copied.
    """

    def __init__(self, tensor: Tensor, work: dist.Work | None = None) -> None:
        self._tensor, self._work = tensor.detach(), work
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            stream = _side_stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                if work is not None:
                    work.wait()  # by the stream, not by the host
                self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host.copy_(self._tensor, non_blocking=True)
                self._arrived = stream.record_event()

    def read(self) -> Tensor:
        """The tensor on the CPU. Waits for this copy alone; on a CPU for the collective."""
        if self._arrived is not None:
            self._arrived.synchronize()
            return self._host
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensor
