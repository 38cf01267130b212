"""Image files to pixels: RGB, resized to a square, uint8.

The resize is direct and bicubic (no crop, no padding, no augmentation), as the reference of the paper does. Transparency is laid
over white, EXIF rotation applied, 16-bit grey scaled to 8 bits. Normalisation is the model's, on its own device. What this gives up: colour
profiles (ICC) and the later frames of animations.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vltrain.errors import InputError

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode_image(data: bytes, image_size: int, max_pixels: int, where: str) -> np.ndarray:
    """Decodes an image file's bytes.

    Args:
        image_size: edge of the square, in pixels.
        max_pixels: larger files are refused before they are decoded.
        where: file and sample, named in errors.

    Returns:
        uint8 [3, image_size, image_size], RGB.

    Raises:
        InputError: empty, damaged, truncated, of an unknown format, or too large.
    """
    image = open_rgb(data, max_pixels, where)
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def open_rgb(data: bytes, max_pixels: int, where: str) -> Image.Image:
    """Decodes an image file's bytes at its own size, upright and in RGB; raises as `decode_image` does."""
    # Pillow itself judges the size, before it decodes, also that of pictures inside pictures (icons, frames).
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _TOO_LARGE as error:
        found = str(error).partition(" exceeds")[0]  # "Image size (N pixels)"
        raise InputError(f"{where}: {found}, more than the allowed {max_pixels}; shrink it or raise the limit (max_image_pixels)") from None
    except UnidentifiedImageError:
        raise InputError(f"{where}: not a readable image ({len(data)} bytes, of no known format)") from None
    except Exception as error:  # on damaged files Pillow's readers raise whatever their arithmetic happens to run into
        raise InputError(f"{where}: not a readable image ({len(data)} bytes; {str(error) or type(error).__name__})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow would clip to 255. Integers are 16-bit values; floats are taken as already in [0, 255].
        values = np.asarray(image)
        scaled = values / 257 if image.mode != "F" else values
        grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        if "transparency" in image.info:  # the one value that a PNG of greys may call transparent
            grey[values == image.info["transparency"]] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
