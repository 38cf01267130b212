"""What a caller calls an image becomes a picture that the model reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vltrain.data.images import read_image
from vltrain.data.pictures import ImageReader
from vltrain.errors import InputError

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
EXPECTED = "a path, the bytes of an image file, a PIL image, or an array of uint8 [height, width, 3] or [height, width]"


def pictures_in(images: Sequence[ImageLike], reader: ImageReader, max_pixels: int) -> list[np.ndarray]:
    """A picture of `reader` for each image, as training and evaluation make it of the same file.

    Args:
        images: see EXPECTED; of a PIL image and an array the pixels are taken as they are, where a large JPEG file is
            decoded at a fraction of its size.
        max_pixels: a file too large for so many is refused before it is read.

    Raises: InputError naming the image: cannot be read, is none, is too large.
    """
    if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray)):
        raise InputError(f"images: found one {type(images).__name__}, expected a list of images: [image]")
    return [_picture(image, reader, max_pixels, f"image {number + 1}") for number, image in enumerate(images)]


def _picture(image: Any, reader: ImageReader, max_pixels: int, where: str) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        path = Path(image).expanduser()
        return reader.decode(read_image(path, max_pixels, str(path), inside=None), str(path))
    if isinstance(image, (bytes, bytearray)):
        return reader.decode(bytes(image), where)
    if isinstance(image, np.ndarray):
        if (
            image.dtype != np.uint8
            or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
            or 0 in image.shape
        ):
            raise InputError(f"{where}: found an array of {image.dtype} {list(image.shape)}, expected {EXPECTED}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(f"{where}: found {type(image).__name__}, expected {EXPECTED}")
    return reader.take(image, where)
