"""Which images look the same, though their bytes differ: another encoder, another quality, another size.

Three descriptions of an image, from one decoding:

    hash   64 bits: is each of 8 x 8 places clearly darker than its left neighbour? (dHash, with a margin: on an even
           ground, where it would otherwise be noise, no bit is set)
    mirror the hash of the image left to right
    thumb  uint8 [16, 16, 3]: the image as 16 x 16 colours

Images whose hashes differ in at most `MOST_BITS` bits are compared by thumbs, on average and where they differ most:
two maps in which another state is coloured look alike on average only. Measured on easy-VQA, ScienceQA and IconQA:
copies as JPEG of quality 60 to 85, at half to one and a half times the size, keep below both bounds, but for drawings
of hair lines at half their size; of images that are different ones, none does.

Trade-off: crops, turned and recoloured copies are not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vltrain.data.images import open_rgb, read_image, sizes_below
from vltrain.data.report.groups import Groups
from vltrain.errors import InputError

MOST_BITS, MOST_MEAN, MOST_ANYWHERE = 4, 4.0, 48
"""How far copies may be from each other: bits of the hash, levels of 255 of the thumb on average and anywhere."""
_MARGIN = 4  # of 255: a smaller step between neighbours is none
_EDGE, _BLOCK, _MOST_COMPARED = 16, 256, 256
_AT_LEAST = 8 * _EDGE  # pixels that a JPEG keeps of either edge where it is larger, which saves most of its decoding


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Of n images: hashes and mirrors uint64 [n], thumbs uint8 [n, 768], sizes int64 [n, 2] (height, width). `unread`:
    what is wrong with those that cannot be read, by number; their rows are zeros."""

    hashes: np.ndarray
    mirrors: np.ndarray
    thumbs: np.ndarray
    sizes: np.ndarray
    unread: dict[int, str]


def look_at(files: Sequence[Path], max_pixels: int) -> Looks:
    """Decodes images. One that cannot be read is told in `unread`."""
    count = len(files)
    (hashes, mirrors), thumbs = np.zeros((2, count), np.uint64), np.zeros((count, 3 * _EDGE**2), np.uint8)
    sizes, unread = np.zeros((count, 2), np.int64), dict[int, str]()
    for number, file in enumerate(files):
        try:
            data = read_image(file, max_pixels, str(file), inside=None)
            image = open_rgb(data, max_pixels, str(file), at_least=_AT_LEAST)
            sizes[number] = sizes_below(file.parent, max_pixels)(file.name)
        except InputError as error:
            unread[number] = str(error)
            continue
        thumbs[number] = np.asarray(image.resize((_EDGE, _EDGE), Image.Resampling.BOX)).ravel()
        grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L")).astype(np.int16)
        hashes[number], mirrors[number] = _hash_of(grey), _hash_of(grey[:, ::-1])
    return Looks(hashes=hashes, mirrors=mirrors, thumbs=thumbs, sizes=sizes, unread=unread)


def _hash_of(grey: np.ndarray) -> np.uint64:
    return np.packbits(grey[:, :-1] - grey[:, 1:] > _MARGIN).view(np.uint64)[0]


def near_images(looks: Looks) -> list[int]:
    """For each image the number of the first one that looks the same, or does in a mirror. Blocks of rows, so that
    memory is bounded; those that cannot be read look like no other."""
    count = len(looks.hashes)
    groups = Groups(count)
    readable = np.ones(count, bool)
    readable[list(looks.unread)] = False
    mirrored = looks.thumbs.reshape(count, _EDGE, _EDGE, 3)[:, :, ::-1].reshape(looks.thumbs.shape)
    for hashes, thumbs in ((looks.hashes, looks.thumbs), (looks.mirrors, mirrored)):
        for first in range(0, count, _BLOCK):
            last = min(first + _BLOCK, count)
            bits = np.bitwise_count(hashes[first:last, None] ^ looks.hashes[None, :last])
            close = (bits <= MOST_BITS) & readable[None, :last] & readable[first:last, None]
            close &= np.arange(last)[None] < np.arange(first, last)[:, None]
            for row in np.flatnonzero(close.any(axis=1)).tolist():
                others = np.flatnonzero(close[row])
                if len(others) > _MOST_COMPARED:  # the nearest by their hashes
                    others = others[np.argsort(bits[row, others], kind="stable")[:_MOST_COMPARED]]
                for other in others[_is_copy(thumbs[first + row], looks.thumbs[others])].tolist():
                    groups.join(first + row, other)
    return [groups.root(number) for number in range(count)]


def _is_copy(thumb: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [m]: which of `others` [m, 768] are the image of that thumb."""
    differences = np.abs(others.astype(np.int16) - thumb.astype(np.int16))
    return (differences.mean(axis=1) <= MOST_MEAN) & (differences.max(axis=1) <= MOST_ANYWHERE)
