"""How much memory tensors take while a program runs: bytes alive now, and the most there ever were.

Every operation's results are seen as torch dispatches them, on any device, so tensors without memory count as what they
stand for: a step can be measured that no machine here could hold. Trade-off: not counted is what is allocated without
an operation (workspaces of kernels), and rounding and fragmentation by a device's allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A context that counts the storages of all tensors made within it, each once however many views it has.

    live_bytes: of those that still exist; peak_bytes: the most that existed at once, since the start or `restart_peak`.

    Args:
        ignored: tensors that exist already; neither they nor views of them count.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._ignored = {
            tensor.untyped_storage()._cdata: tensor for tensor in ignored
        }  # kept, so that no other takes the address
        self._counted: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def restart_peak(self) -> int:
        """From here on the peak is that of what follows. Returns the one until now."""
        peak, self.peak_bytes = self.peak_bytes, self.live_bytes
        return peak

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted or key in self._ignored:
            return
        self._counted[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())
        self._counted[key].atexit = False
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._counted[key]
        self.live_bytes -= num_bytes
