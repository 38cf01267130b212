"""The most memory that was in use at once, as the device counts it."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESTARTS_PEAK = "5"  # see proc(5)


class PeakMemory:
    """From its making on: of a GPU torch's tensors, on a CPU all of the process, whose peak may be from before where
    the system does not begin it anew."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # a container may forbid it, other systems have none
            _CLEAR.write_text(_RESTARTS_PEAK)

    @property
    def kind(self) -> str:
        """What is counted, in words."""
        return "of the GPU" if self._device.type == "cuda" else "of the process"

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            line = next(line for line in _STATUS.read_text().split("\n") if line.startswith("VmHWM:"))
            return int(line.split()[1]) << 10
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
