"""What a caller calls an image becomes the square that a ViT reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vltrain.data.images import decode_image, frame_image, read_image, upright_rgb
from vltrain.errors import InputError
from vltrain.models.interface import VisionLanguageModel

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
EXPECTED = "a path, the bytes of an image file, a PIL image, or an array of uint8 [height, width, 3] or [height, width]"


def squares(images: Sequence[ImageLike], model: VisionLanguageModel, max_pixels: int) -> list[np.ndarray]:
    """uint8 [3, H, W] of the model's image size for each image, as training and evaluation make it of the same file.

    Args:
        images: see EXPECTED; of a PIL image and an array the pixels are taken as they are, where a large JPEG file is
            decoded at a fraction of its size.
        max_pixels: a larger image is refused before it is decoded.

    Raises: InputError naming the image: cannot be read, is none, is too large.
    """
    if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray)):
        raise InputError(f"images: found one {type(images).__name__}, expected a list of images: [image]")
    return [_square(image, model, max_pixels, f"image {number + 1}") for number, image in enumerate(images)]


def _square(image: Any, model: VisionLanguageModel, max_pixels: int, where: str) -> np.ndarray:
    size, framing = model.image_size, model.framing
    if isinstance(image, (str, os.PathLike)):
        path = Path(image).expanduser()
        return decode_image(read_image(path, max_pixels, str(path), inside=None), size, max_pixels, str(path), framing)
    if isinstance(image, (bytes, bytearray)):
        return decode_image(bytes(image), size, max_pixels, where, framing)
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
    return frame_image(upright_rgb(image, max_pixels, where), size, max_pixels, where, framing)
