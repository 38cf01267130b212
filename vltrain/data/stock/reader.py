"""An `ImageReader` of a stock model: pictures at their own size, and what its image processor makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vltrain.batch import ImageInputs
from vltrain.data.images import open_rgb, upright_rgb
from vltrain.data.stock.layouts import layouts_of
from vltrain.data.stock.positions import positions_of
from vltrain.data.stock.processor import StockProcessor, stock_processor
from vltrain.data.stock.source import StockSource
from vltrain.schema import PackedRow

_BLANK_EDGE = 64  # pixels; every family enlarges it to what it reads at least


@dataclass(frozen=True)
class StockReader:
    """See `ImageReader`. A picture is uint8 [height, width, 3]; `max_pixels`: larger images are refused before they are
    decoded."""

    source: StockSource
    max_pixels: int

    @property
    def _processor(self) -> StockProcessor:
        return stock_processor(self.source)

    @property
    def counts_matter(self) -> bool:
        return layouts_of(self._processor).counts_matter

    def decode(self, data: bytes, where: str) -> np.ndarray:
        return np.asarray(open_rgb(data, self.max_pixels, where))

    def take(self, image: Image.Image, where: str) -> np.ndarray:
        return np.asarray(upright_rgb(image, self.max_pixels, where))

    def size_of(self, picture: np.ndarray) -> tuple[int, int]:
        height, width, _ = picture.shape
        return height, width

    def blank(self) -> np.ndarray:
        """Black."""
        return np.zeros((_BLANK_EDGE, _BLANK_EDGE, 3), np.uint8)

    def stack(self, pictures: Sequence[np.ndarray], counts: Sequence[int]) -> ImageInputs:
        """All pictures processed together. Where counts matter, those of samples with several images come behind those
        that stand alone (`counts` ascends), and of a single one a copy is put behind, which no run shows."""
        if not pictures:
            return ImageInputs(tensors={}, tokens=torch.empty(0, dtype=torch.int64))
        images = [Image.fromarray(picture) for picture in pictures]
        made, texts = self._processor.process(self._as_samples(images, counts) if self.counts_matter else [images])
        tokens = [layouts_of(self._processor).tokens_in(text) for text in texts]
        known = inspect.signature(self._processor.image_features).parameters
        tensors = {name: one for name, one in made.items() if isinstance(one, torch.Tensor) and name in known}
        return ImageInputs(tensors=tensors, tokens=torch.tensor(tokens))

    def _as_samples(self, images: list[Image.Image], counts: Sequence[int]) -> list[list[Image.Image]]:
        alone = [[image] for image, count in zip(images, counts) if count == 1]
        together = images[len(alone) :]
        return [*alone, *([together if len(together) > 1 else together * 2] if together else [])]

    def facts(self) -> Any:
        return self._processor.facts()

    def filler_row(self, image: bool) -> PackedRow:
        rows = positions_of(self._processor).rows
        return PackedRow(
            input_ids=np.zeros(2, np.int32),
            loss_mask=np.zeros(2, bool),
            segment_lengths=np.array([2], np.int32),
            image_ids=np.empty(0, np.int64),
            image_slots=np.empty(0, np.int32),
            sample_ids=("filler",),
            position_ids=np.tile(np.arange(2, dtype=np.int32), (rows, 1)) if rows else np.empty((0, 0), np.int32),
            blocks=np.full(2, -1, np.int32) if self._processor.family.blocks else np.empty(0, np.int32),
        )
