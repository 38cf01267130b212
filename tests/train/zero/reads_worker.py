"""Counts, in one rank's process, what makes the host wait for the device during training steps off logging steps.

On CUDA torch's own sync debug mode tells. On a CPU a stand-in does: whatever is computed from weights or from what
`Batch.to` and `to_device` give counts as on the device, and each operation that reads such a tensor's values on the
host is noted. Each read is put down to the nearest of the packages on the stack; DeepSpeed's own are kept apart.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train import worker
from vltrain.batch import Batch
from vltrain.distributed.readback import HostCopy
from vltrain.models.instructblip import model as qformer
from vltrain.models.mmt import model as multimodal
from vltrain.train import guard as guard_module
from vltrain.train.trainer import Trainer

READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "equal",
    "argwhere",
    "repeat_interleave",
}
HOST_CALLS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
PACKAGES = ("/vltrain/", "/deepspeed/", "/transformers/", "/peft/", "/tests/train/", "autograd/graph.py")


def origin() -> str:
    """The nearest frame of `PACKAGES`, as FILE:LINE; of this file's none."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and any(part in frame.filename for part in PACKAGES):
            return f"{frame.filename}:{frame.lineno} {frame.line}"
    return "nowhere"


class Reads(TorchDispatchMode):
    """The stand-in. `on_device`: storages that count as on the device, kept alive so that no other takes their
    address."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: dict[int, torch.UntypedStorage] = {}
        self.found: list[str] = []

    def mark(self, value: object) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.on_device[storage._cdata] = storage

    def marked(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.on_device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        from_device = any(map(self.marked, given))
        by_mask = name in ("index", "index_put", "index_put_") and any(
            one.dtype == torch.bool and self.marked(one) for one in tree_leaves(args[1]) if one is not None
        )
        if from_device and (name in READS and not (kwargs or {}).get("output_size") or by_mask):
            self.found.append(f"{name}: {origin()}")
        result = func(*args, **(kwargs or {}))
        if from_device:
            self.mark(result)
        return result


class HostCalls(TorchFunctionMode):
    """What dispatches nothing on a CPU."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST_CALLS and self.reads.marked(args[0]):
            self.reads.found.append(f"{func.__name__}: {origin()}")
        return func(*args, **(kwargs or {}))


@contextmanager
def stand_in(trainer: Trainer) -> Iterator[list[str]]:
    """Reads inside the block, on a CPU."""
    reads = Reads()
    reads.mark(list(trainer.engine.model.parameters()) + list(trainer.engine.model.buffers()))
    moved, read = Batch.to, HostCopy.read

    def to(batch, device):
        result = moved(batch, device)
        for name in Batch._MOVED:
            setattr(result, name, getattr(result, name).clone())  # on a CPU `to` gives the very tensor
        reads.mark([getattr(result, name) for name in Batch._MOVED])
        return result

    def read_copy(copy):
        host = read(copy)
        with torch.utils._python_dispatch._disable_current_modes():
            return host.clone()

    def to_device(tensor, device):
        result = tensor.clone()
        reads.mark(result)
        return result

    Batch.to, HostCopy.read = to, read_copy
    for module in (multimodal, qformer, guard_module):
        module.to_device = to_device
    multimodal.MultimodalModel._check = qformer.InstructBlip._check = lambda model, batch: (
        None
    )  # on a device nothing is checked
    with reads, HostCalls(reads):
        yield reads.found


@contextmanager
def sync_debug_mode(trainer: Trainer) -> Iterator[list[str]]:
    """Reads inside the block, on CUDA."""
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: (
            "synchroniz" in str(message) and found.append(f"{str(message)[:60]}: {origin()}")
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def watch(trainer: Trainer, found: dict[str, list[str]]) -> None:
    """Lets `trainer.train` note the reads of each of its steps, from the taking of the batches to the next one's."""
    steps, watching = trainer.steps, sync_debug_mode if trainer.engine.device.type == "cuda" else stand_in

    def watched() -> Iterator[int]:
        iterator = steps()
        yield next(iterator)  # the first makes optimizer states and the like
        with watching(trainer) as reads:
            for done in iterator:
                found[str(done)] = list(reads)
                reads.clear()
                if done == NUM_WATCHED + 1:
                    break
        yield from iterator

    trainer.steps = watched


NUM_WATCHED = 3


def run(scenario: dict, rank: int, world_size: int) -> None:
    found: dict[str, list[str]] = {}
    worker.run(scenario, rank, world_size, prepare=lambda trainer: watch(trainer, found))
    Path(scenario["output"], f"reads.{rank}.json").write_text(json.dumps(found))


def main(scenarios: str) -> None:
    worker.main(scenarios, run)


if __name__ == "__main__":
    main(sys.argv[1])
