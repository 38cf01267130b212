"""What a stock model is told of each token beside its id: its position, and which tokens it sees both ways.

Positions of families that count images in rows and columns are made by the family's own `get_rope_index`, a segment at
a time, when samples are tokenised: made of a pack they would be wrong.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch

from vltrain.batch import tensor_of
from vltrain.data.stock.layouts import Layout, facts_of
from vltrain.data.stock.processor import StockProcessor
from vltrain.errors import InputError

_AXES = 3


class Positions:
    """Those of one processor's model."""

    def __init__(self, processor: StockProcessor) -> None:
        self._processor = processor
        model = processor.model_class
        self._rope: Any = None
        if hasattr(model, "get_rope_index"):
            # A method of a network that needs its config alone: the network is not built.
            self._rope = model.__new__(model)
            object.__setattr__(self._rope, "config", processor.config)
            self._takes = inspect.signature(self._rope.get_rope_index).parameters
            self._of_images: list[int] = list(processor.inner.image_token_ids)

    def of(self, ids: np.ndarray, layouts: list[Layout]) -> np.ndarray:
        """int32 [R, L], or [0, 0] where they count from 0.

        Args:
            ids: int32 [L] of one segment.
            layouts: of its images, in order.
        """
        if self._rope is None:
            first = self._processor.family.first_position
            return np.arange(first, first + len(ids), dtype=np.int32)[None] if first else np.empty((0, 0), np.int32)
        asked = tensor_of(ids.astype(np.int64))[None]
        kinds = tensor_of(np.isin(ids, self._of_images).astype(np.int64))[None]
        given = {"mm_token_type_ids": kinds, **facts_of(layouts)}
        try:
            with torch.no_grad():
                found, _ = self._rope.get_rope_index(
                    input_ids=asked, **{name: value for name, value in given.items() if name in self._takes}
                )
        except Exception as error:  # what a family's code runs into without the network that it is a method of
            told = " ".join(str(error).split())[:200]
            kind = self._processor.config.model_type
            raise InputError(f"no positions can be made for a model of type {kind!r} ({told})") from None
        places = found[:, 0].to(torch.int32).numpy()
        if len(places) != _AXES:
            return places
        # In front of time, height and width, such models take the tokens' own places.
        return np.concatenate([np.arange(len(ids), dtype=np.int32)[None], places])

    @property
    def rows(self) -> int:
        """R; 0 where they count from 0."""
        return len(self.of(np.zeros(1, np.int32), []))


def blocks_of(ids: np.ndarray, mask: np.ndarray, processor: StockProcessor) -> np.ndarray:
    """int32 [L], see `vltrain.batch.Batch.blocks`; [0] in families that are causal throughout.

    Args:
        ids, mask: int32 and bool [L] of one segment; the answer is what `mask` marks.
    """
    kind = processor.family.blocks
    if kind is None:
        return np.empty(0, np.int32)
    if kind == "prefix":
        given = np.arange(len(ids)) < (int(mask.argmax()) if mask.any() else len(ids))
        return np.where(given, 0, -1).astype(np.int32)
    shown = ids == processor.image_token_id
    begins = shown & ~np.concatenate([[False], shown[:-1]])
    return np.where(shown, np.cumsum(begins) - 1, -1).astype(np.int32)


@functools.lru_cache(maxsize=4)
def positions_of(processor: StockProcessor) -> Positions:
    """One object in a process."""
    return Positions(processor)
