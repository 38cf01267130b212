"""The audit's samples: a few segments of random tokens, and rows that pack them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vltrain.batch import Batch
from vltrain.schema import IGNORE_INDEX

LENGTHS = (13, 5, 21, 1, 9, 13)
"""Of text segments: equal ones, one of one token, and some longer than any window of a small config."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One segment, on the CPU.

    input_ids     int64 [L]
    labels        int64 [L]          shifted: labels[t] is what position t predicts, or IGNORE_INDEX
    position_ids  int64 [L] or [R, L]
    blocks        int64 [L] or [0]   see `Batch.blocks`, numbered from 0 in each segment
    images        which of the audit's images its image runs show
    first_special ids from here on are no text
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    blocks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    images: tuple[int, ...] = ()
    first_special: int

    @property
    def is_text(self) -> Tensor:
        """bool [L]: which ids are text, and may be others."""
        return self.input_ids < self.first_special

    @property
    def num_labels(self) -> int:
        """Labels that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())


def text_pieces(first: int, last: int, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Piece]:
    """Segments of random ids from `first` to before `last`; each position but a segment's last predicts the next."""
    generator = torch.Generator().manual_seed(seed)
    return [text_piece(torch.randint(first, last, (length,), generator=generator), last) for length in lengths]


def text_piece(ids: Tensor, first_special: int) -> Piece:
    """A segment of text alone. `ids`: int64 [L]."""
    labels = torch.cat([ids[1:], ids.new_full((1,), IGNORE_INDEX)])
    return Piece(input_ids=ids, labels=labels, position_ids=torch.arange(len(ids)), first_special=first_special)


def text_row(pieces: Sequence[Piece], num_labels: int | None = None) -> Batch:
    """A packed row of segments without images."""
    return Batch(
        input_ids=torch.cat([one.input_ids for one in pieces]),
        labels=torch.cat([one.labels for one in pieces]),
        position_ids=torch.cat([one.position_ids for one in pieces], dim=-1),
        segment_lengths=torch.tensor([len(one.input_ids) for one in pieces]),
        pixels=torch.empty(0, 3, 1, 1, dtype=torch.uint8),
        image_slots=torch.empty(0, dtype=torch.int64),
        sample_ids=tuple(str(place) for place in range(len(pieces))),
        num_label_tokens=sum(one.num_labels for one in pieces) if num_labels is None else num_labels,
        label_lengths=torch.tensor([one.num_labels for one in pieces]),
    )
