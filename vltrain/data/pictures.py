"""How one model reads images: a file's bytes become a picture, and the pictures of a batch what its ViT is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from vltrain.batch import ImageInputs, tensor_of
from vltrain.data.images import decode_image, frame_image, read_image, upright_rgb
from vltrain.schema import IMAGE_MODALITY_TOKEN, SQUARE, TEXT_MODALITY_TOKEN, Framing, PackedRow


class ImageReader(Protocol):
    """Images to what a model is given. Picklable, for the processes that decode.

    counts_matter  whether what an image becomes depends on how many its sample shows
    """

    @property
    def counts_matter(self) -> bool: ...

    def decode(self, data: bytes, where: str) -> np.ndarray:
        """The picture in an image file's bytes, uint8. Raises InputError naming `where` (file and sample) for what
        cannot be read."""
        ...

    def take(self, image: Image.Image, where: str) -> np.ndarray:
        """The picture of an image that a program has opened, as `decode`."""
        ...

    def size_of(self, picture: np.ndarray) -> tuple[int, int]:
        """(height, width) that `SampleEncoder` is to know of it."""
        ...

    def blank(self) -> np.ndarray:
        """The picture of a batch that has none but must run the vision tower."""
        ...

    def stack(self, pictures: Sequence[np.ndarray], counts: Sequence[int]) -> torch.Tensor | ImageInputs:
        """What a batch holds of its distinct pictures, on the CPU; `counts`: how many images the sample has that shows
        each."""
        ...

    def facts(self) -> Any:
        """What decides what an image becomes, plain JSON."""
        ...

    def filler_row(self, image: bool) -> PackedRow:
        """Two tokens without label, for a rank that has no pack; `image`: a batch with a blank picture."""
        ...


@dataclass(frozen=True, kw_only=True)
class SquareReader:
    """An `ImageReader`: all images become squares, uint8 [3, size, size], which the model normalises itself.

    size: in pixels; max_pixels: larger images are refused before they are decoded; framing: how an image becomes a
    square.
    """

    size: int
    max_pixels: int = 50_000_000
    framing: Framing = SQUARE
    counts_matter: bool = False

    def decode(self, data: bytes, where: str) -> np.ndarray:
        return decode_image(data, self.size, self.max_pixels, where, self.framing)

    def take(self, image: Image.Image, where: str) -> np.ndarray:
        return frame_image(upright_rgb(image, self.max_pixels, where), self.size, self.max_pixels, where, self.framing)

    def size_of(self, picture: np.ndarray) -> tuple[int, int]:
        return self.size, self.size

    def blank(self) -> np.ndarray:
        """Black."""
        return np.zeros((3, self.size, self.size), np.uint8)

    def stack(self, pictures: Sequence[np.ndarray], counts: Sequence[int]) -> torch.Tensor:
        """uint8 [N, 3, size, size]."""
        return tensor_of(np.stack(pictures) if pictures else np.empty((0, 3, self.size, self.size), np.uint8))

    def facts(self) -> Any:
        return {"size": self.size, "framing": asdict(self.framing)}

    def filler_row(self, image: bool) -> PackedRow:
        return PackedRow(
            input_ids=np.array([IMAGE_MODALITY_TOKEN if image else TEXT_MODALITY_TOKEN, 0], np.int32),
            loss_mask=np.zeros(2, bool),
            segment_lengths=np.array([2], np.int32),
            image_ids=np.empty(0, np.int64),
            image_slots=np.empty(0, np.int32),
            sample_ids=("filler",),
            instruction_ids=np.zeros(1, np.int32),
            instruction_lengths=np.ones(1, np.int32),
        )


@dataclass(frozen=True)
class Pictures:
    """The images that samples show, by name: `load` reads one, `reader` says what becomes of them."""

    reader: ImageReader
    load: Callable[[str], np.ndarray]


def pictures_below(folder: Path, reader: ImageReader, max_pixels: int) -> Pictures:
    """Those of the files in `folder`. `max_pixels`: a file too large for so many is refused before it is read."""

    def load(name: str) -> np.ndarray:
        where = str(folder / name)
        return reader.decode(read_image(folder / name, max_pixels, where, inside=folder), where)

    return Pictures(reader, load)
