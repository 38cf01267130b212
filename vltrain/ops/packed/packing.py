"""How the segments of a packed row are laid out: one after another, as the model sees them, and as padded groups of
similar length, where a segment is a row of its own.

A group [S, L] is what any causal operation can run on as on a batch: padding stands at the end of a segment, so that
causality alone hides it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vltrain.ops.transfer import to_device

# A segment joins a padded group if it is at least this share of the group's longest: bounds what padding wastes.
MIN_FILL = 0.8

BlockRule = Literal["within_window", "over_window", "windowed_layers"]
"""Where tokens of one block see each other, beside what causality lets them see.

within_window    in all layers; where a layer has a sliding window, no further back than that (Gemma 3)
over_window      in all layers, whatever their window (PaliGemma 2)
windowed_layers  in layers with a sliding window, no further back than that; in others not at all (Gemma 4)
"""


class Packing:
    """The segments of a row, and their layout as padded groups, computed on the CPU when it is first asked for.

    lengths  int64 [S] on the CPU.
    blocks   int64 [T] on the CPU, or None: tokens of a segment with one number from 0 on see each other both ways.
    masks    what `vltrain.ops.packed.masks` made for this row, kept for the layers that ask for the same.
    tiles    what `vltrain.ops.packed.tiled` made of them.
    """

    def __init__(
        self,
        segment_lengths: Tensor,
        device: torch.device | str = "cpu",
        blocks: Tensor | None = None,
        block_rule: BlockRule = "within_window",
    ) -> None:
        num_tokens = int(segment_lengths.sum())
        assert blocks is None or blocks.shape == (num_tokens,), f"blocks {blocks.shape} of a row of {num_tokens} tokens"
        self.lengths = segment_lengths
        self.device = device
        self.blocks = blocks
        self.block_rule: BlockRule = block_rule
        self.masks: dict[Any, Tensor | None] = {}
        self.tiles: dict[Any, list[Any]] = {}

    @cached_property
    def starts(self) -> Tensor:
        """int32 [S + 1]: where segments begin, and T."""
        return to_device(F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32), self.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return int(self.lengths.max())

    @cached_property
    def typical(self) -> float:
        """Tokens of the segment that a typical pair of query and key is in."""
        lengths = self.lengths.double()
        return float((lengths**3).sum() / (lengths**2).sum())

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(number of segments, padded length) of each group; their products sum to P."""
        return self._layout[0]

    @property
    def pad(self) -> Tensor:
        """int64 [P]: which token of the row stands in each padded place (the row's token 0 where none does)."""
        return self._on_device[0]

    @property
    def unpad(self) -> Tensor:
        """int64 [T]: in which padded place each token of the row stands."""
        return self._on_device[1]

    @property
    def is_pad(self) -> Tensor:
        """bool [P]: whether a padded place holds no token."""
        return self._on_device[2]

    def parts(self) -> list[tuple[slice, int, int]]:
        """Of each group: its padded places, number of segments and padded length."""
        found, start = [], 0
        for num_segments, length in self.groups:
            found.append((slice(start, start + num_segments * length), num_segments, length))
            start += num_segments * length
        return found

    @cached_property
    def group_blocks(self) -> list[Tensor | None]:
        """Of each group: int64 [S, L], `blocks` with -1 in padding; None where none of its tokens is in a block."""
        if self.blocks is None:
            return [None] * len(self.groups)
        _, pad, unpad = self._layout
        is_pad = torch.ones(len(pad), dtype=torch.bool).index_fill_(0, unpad, False)
        padded = self.blocks.to("cpu")[pad].masked_fill_(is_pad, -1)
        groups = [padded[part].view(num_segments, length) for part, num_segments, length in self.parts()]
        return [to_device(group, self.device) if bool((group >= 0).any()) else None for group in groups]

    @cached_property
    def _layout(self) -> tuple[tuple[tuple[int, int], ...], Tensor, Tensor]:
        """`groups`, and `pad` and `unpad` on the CPU."""
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        lengths = self.lengths.tolist()
        order = sorted(range(len(lengths)), key=lambda segment: -lengths[segment])
        groups: list[tuple[int, int]] = []
        pad: list[Tensor] = []
        unpad = torch.empty(sum(lengths), dtype=torch.int64)
        place = first = 0
        while first < len(order):
            longest = lengths[order[first]]
            last = first
            while last < len(order) and lengths[order[last]] >= MIN_FILL * longest:
                start, length = starts[order[last]], lengths[order[last]]
                row = torch.zeros(longest, dtype=torch.int64)
                row[:length] = torch.arange(start, start + length)
                pad.append(row)
                unpad[start : start + length] = torch.arange(place, place + length)
                place += longest
                last += 1
            groups.append((last - first, longest))
            first = last
        return tuple(groups), torch.cat(pad), unpad

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """`pad`, `unpad` and `is_pad`: three small copies."""
        _, pad, unpad = self._layout
        is_pad = torch.ones(len(pad), dtype=torch.bool).index_fill_(0, unpad, False)
        return to_device(pad, self.device), to_device(unpad, self.device), to_device(is_pad, self.device)


def to_padded(states: Tensor, packing: Packing) -> Tensor:
    """Tokens [T, ...] -> padded places [P, ...]."""
    return _Padded.apply(states, packing)


def from_padded(states: Tensor, packing: Packing) -> Tensor:
    """Padded places [P, ...] -> tokens [T, ...], the padding dropped."""
    return _Unpadded.apply(states, packing)


class _Padded(torch.autograd.Function):
    """Both ways are gathers: the gradient of torch's own would add with atomics, or wait for the device.

    What stands in padding gets no gradient: causality hides it from every token before it, and what it sees is dropped.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.pad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.packing.unpad), None


class _Unpadded(torch.autograd.Function):
    """See `_Padded`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.unpad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        is_pad = ctx.packing.is_pad.view(-1, *(1,) * (gradient.dim() - 1))
        return gradient.index_select(0, ctx.packing.pad).masked_fill(is_pad, 0), None
