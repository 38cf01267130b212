"""Digests of the frozen weights, by part and dtype, the same at every ZeRO stage and number of ranks: what shows that
nothing moved that should not.

Frozen weights are the parameters without gradient and the buffers that belong to the weights (the scales of quantised
ones). Where ZeRO-3 partitions a parameter, the digests of its parts add up (`vltrain.train.zero.bit_digest`); elsewhere
each rank digests its own copy, and one that differs from rank 0's changes the digest.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vltrain.models.interface import VisionLanguageModel
from vltrain.train.zero.bit_digest import bit_digest

logger = logging.getLogger(__name__)

NAMED = 5


class FrozenWeights:
    """Those of a model that DeepSpeed has taken over. `device`: of the ranks' collectives."""

    def __init__(self, model: VisionLanguageModel, device: torch.device) -> None:
        self._device = device
        named = sorted((*_frozen_parameters(model), *_kept_buffers(model)))
        self._tensors = [(name, model.part_of(name), tensor) for name, tensor in named]
        self._partitioned = torch.tensor([hasattr(tensor, "ds_tensor") for _, _, tensor in self._tensors])
        self._at_start: list[int] | None = None

    def digests(self) -> dict[str, str]:
        """Hexadecimal digest by `PART/DTYPE`, {"llm/bfloat16": "9f0c..."}; {} where nothing is frozen. A collective.

        Tensors that have moved since the first call are named in the log, by rank 0.
        """
        numbers = self._numbers()
        moved = self._moved(numbers)
        if moved and dist.get_rank() == 0:
            more = f" and {len(moved) - NAMED} more" if len(moved) > NAMED else ""
            logger.warning("frozen weights have moved since the start: %s%s", ", ".join(moved[:NAMED]), more)
        lines: dict[str, list[str]] = defaultdict(list)
        for (name, part, tensor), number in zip(self._tensors, numbers, strict=True):
            shape = list(getattr(tensor, "ds_shape", tensor.shape))
            key = f"{part}/{str(tensor.dtype).removeprefix('torch.')}"
            lines[key].append(f"{name} {shape} {number % 2**64:016x}\n")
        return {key: hashlib.sha256("".join(found).encode()).hexdigest()[:16] for key, found in sorted(lines.items())}

    def moved(self) -> list[str]:
        """Names of the tensors that have moved since the first call of `digests`. A collective."""
        return self._moved(self._numbers())

    def __len__(self) -> int:
        return len(self._tensors)

    @torch.no_grad()
    def _numbers(self) -> list[int]:
        """A number for each tensor, the same on all ranks. A collective."""
        if not self._tensors:
            return []
        own = torch.stack([_own_digest(tensor).to(self._device) for _, _, tensor in self._tensors])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        ranks = torch.stack(everyone).cpu()
        # Of copies rank 0's, and what the others' differ by, times an odd number of each rank.
        factors = 2 * torch.arange(len(ranks), dtype=torch.int64)[:, None] + 1
        copies = ranks[0] + ((ranks - ranks[0]) * factors).sum(0)
        return torch.where(self._partitioned, ranks.sum(0), copies).tolist()

    def _moved(self, numbers: list[int]) -> list[str]:
        if self._at_start is None:
            self._at_start = numbers
        return [self._tensors[place][0] for place, one in enumerate(numbers) if one != self._at_start[place]]


def _frozen_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, one) for name, one in model.named_parameters() if not one.requires_grad)


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are part of the weights: those that a state dict would hold."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _own_digest(tensor: Any) -> Tensor:
    """Of this rank's part of a parameter that ZeRO-3 partitions, of all of any other tensor."""
    if not hasattr(tensor, "ds_tensor"):
        return bit_digest(tensor.detach().contiguous().flatten())
    first = dist.get_rank() * tensor.ds_tensor.numel()
    length = min(tensor.ds_tensor.numel(), max(0, tensor.ds_numel - first))  # the last parts are filled up
    if tensor.ds_status.name == "AVAILABLE":  # one that is kept whole: that copy is computed with
        return bit_digest(tensor.detach().flatten()[first:][:length], first)
    return bit_digest(tensor.ds_tensor.detach().flatten()[:length], first)
