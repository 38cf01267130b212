"""What the model gets: a packed row as tensors. Apart from `vltrain.schema`, since preparing data needs no torch, which
takes seconds to load.

Shapes: T tokens of the row, S segments, N distinct images, K image runs, R rows of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch

from vltrain.schema import IGNORE_INDEX


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """A tensor over the array's memory."""
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType] torch gives its argument no type


def listed(tensor: torch.Tensor) -> list[Any]:
    """The numbers of a tensor of one dimension, lists of more."""
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] torch says a list


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """N distinct images as a stock model's processor hands them over, all at once.

    tensors   by the processor's names (pixel_values, image_grid_thw, ...): keywords of `get_image_features`. Images of
              one size or of many, tiles and patches included; {} where N is 0
    tokens    int64 [N], on the CPU: placeholders that each image takes
    """

    tensors: Mapping[str, torch.Tensor]
    tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageInputs:
        """Moves what the model computes on; `tokens` stays on the CPU."""
        moved = {name: one.to(device, non_blocking=non_blocking) for name, one in self.tensors.items()}
        return replace(self, tensors=moved)

    def pin_memory(self) -> ImageInputs:
        """See `Batch.pin_memory`."""
        return replace(self, tensors={name: one.pin_memory() for name, one in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What the frozen image part of a model made of N distinct images (`train.keep_image_features`), in their pixels'
    place.

    rows     [sum of lengths, ...], the vectors of one image behind those of the other
    lengths  int64 [N], on the CPU: vectors of each image
    form     how a stock model's forward takes them, plain JSON; None: as they are
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    form: Any = None

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, count: int) -> ImageFeatures:
        """Of the first `count` images."""
        return replace(self, rows=self.rows[: int(self.lengths[:count].sum())], lengths=self.lengths[:count])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageFeatures:
        """Moves what the model computes on; `lengths` stays on the CPU."""
        return replace(self, rows=self.rows.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageFeatures:
        """See `Batch.pin_memory`."""
        return replace(self, rows=self.rows.pin_memory())


Shown: TypeAlias = torch.Tensor | ImageInputs | ImageFeatures
"""A batch's distinct images, see `Batch.pixels`."""


@dataclass(kw_only=True)
class Batch:
    """One packed row as tensors, ready for the model. A filler (weight zero) stands in where a rank has no pack.

    input_ids       int64 [T]          placeholders below zero; a stock model's are its own image tokens, see `pixels`
    labels          int64 [T]          already shifted: labels[t] is the token that position t predicts, or
                                       IGNORE_INDEX; never across a segment's end
    position_ids    int64 [T]          restarts with every segment; [R, T] where a stock model's forward takes R rows
    segment_lengths int64 [S]          on the CPU
    label_lengths   int64 [S]          on the CPU: labels that carry loss, by segment; an encoder-decoder asks for it
    pixels          uint8 [N, 3, H, W] resized, not normalised (the model does that on its device); or a stock
                    model's `ImageInputs`, run k having `tokens[image_slots[k]]` placeholders; or `ImageFeatures`
    image_slots     int64 [K]
    blocks          int64 [T]          on the CPU: tokens of one number in a segment see each other both ways, -1:
                                       causal; [0] where all are causal
    instruction_ids int64 [S, I]       what a Q-Former reads, -1 where padded; I is 0 where there is none
    sample_ids      S strings
    num_label_tokens                   labels that carry loss
    is_filler                          its loss is multiplied by zero; its forward and backward only match collectives
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segment_lengths: torch.Tensor
    pixels: Shown
    image_slots: torch.Tensor
    sample_ids: tuple[str, ...]
    num_label_tokens: int
    label_lengths: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    instruction_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    blocks: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    is_filler: bool = False

    _MOVED: ClassVar = ("input_ids", "labels", "position_ids", "pixels", "image_slots", "instruction_ids")

    def to(self, device: torch.device | str) -> Batch:
        """Moves what the model computes on; lengths stay on the CPU."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in self._MOVED})

    def segment_labels(self) -> torch.Tensor:
        """int64 [S] on the CPU: label tokens of each segment. Of a batch that is still on the CPU."""
        owner = torch.repeat_interleave(torch.arange(len(self.segment_lengths)), self.segment_lengths)
        return torch.zeros(len(self.segment_lengths), dtype=torch.int64).index_add_(
            0, owner, (self.labels != IGNORE_INDEX).long()
        )

    def pin_memory(self) -> Batch:
        """The same in pinned memory, from which `to` copies to a GPU without a wait; what is pinned already stays where
        it is."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in self._MOVED})
