"""Images as a page embeds them: small, decoded and encoded anew, so that nothing of a file itself reaches a browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

from PIL import Image

from vltrain.data.images import open_rgb
from vltrain.errors import InputError
from vltrain.html.markup import Markup, tag

EDGE, LEAST_EDGE = 256, 96
"""Pixels: larger images are scaled down to the first, smaller ones are shown enlarged to the second."""
SLIMMEST = 1 / 12  # of a side to the other; what is slimmer is cut, and said to be
_LOSSLESS_BYTES = 20_000


class Thumbnails:
    """Draws images by number, each file decoded once.

    Args:
        load: an image file's bytes by its number.
        max_pixels: larger images are not decoded.
    """

    def __init__(self, load: Callable[[int], bytes], max_pixels: int) -> None:
        self._load, self._max_pixels = load, max_pixels
        self._drawn: dict[int, Markup] = {}

    def draw(self, number: int) -> Markup:
        """A figure with the image and its size in pixels; with the reason where it can't be shown."""
        if number not in self._drawn:
            self._drawn[number] = self._figure(number)
        return self._drawn[number]

    def _figure(self, number: int) -> Markup:
        try:
            image = open_rgb(self._load(number), self._max_pixels, f"image {number}")
        except InputError as error:
            return tag("figure", tag("figcaption", f"cannot be shown: {error}"))
        width, height = image.size
        caption = f"image {number}, {width} x {height}"
        shown = _cut(image)
        if shown.size != image.size:
            caption += ", the middle of it"
        shown.thumbnail((EDGE, EDGE))
        scale = max(1.0, LEAST_EDGE / max(shown.size))
        drawn = tag(
            "img",
            src=data_url(shown),
            alt=caption,
            width=round(shown.width * scale),
            height=round(shown.height * scale),
        )
        return tag("figure", drawn, tag("figcaption", caption), Class="small" if scale > 1 else None)


def _cut(image: Image.Image) -> Image.Image:
    """The middle of an image that is so slim that scaled down nothing of it would be seen."""
    width, height = image.size
    most_width, most_height = max(1, round(height / SLIMMEST)), max(1, round(width / SLIMMEST))
    if width <= most_width and height <= most_height:
        return image
    left, top = max(0, (width - most_width) // 2), max(0, (height - most_height) // 2)
    return image.crop((left, top, min(width, left + most_width), min(height, top + most_height)))


def data_url(image: Image.Image) -> str:
    """An RGB image inside an address: as PNG where that is small, else as JPEG."""
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind.upper(), **settings)
        if kind == "jpeg" or buffer.tell() <= _LOSSLESS_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
