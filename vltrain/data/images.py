"""Image files to pixels: RGB, resized to a square, uint8.

The resize is direct and bicubic (no crop, no padding, no augmentation), as the reference of the paper does, unless a
checkpoint asks for another filter or for the middle (`Framing`). Transparency is laid
over white, EXIF rotation applied, 16-bit grey scaled to 8 bits. Normalisation is the model's, on its own device.

Files are untrusted: only formats of a list are opened (Pillow's others start programs, as PostScript's does, or are
rarely looked after), a file's size is judged before it is read, an image's before it is decoded, and a link must stay
below the folder. Decoding takes at most some 16 bytes per pixel. A JPEG far larger than the square is decoded at a
half, a quarter or an eighth of its size, by its own cosine transform, never below three times the square: measured,
values are off by at most 1 of 255 where a picture is smooth, and by 4 where it is as fine as the square can show.

Trade-off: colour profiles (ICC) and the later frames of animations are ignored.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vltrain.errors import InputError
from vltrain.schema import SQUARE, Framing

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# of 255: an image whose brightest value is no more holds, most likely, values of another range (12 of 16 bits, floats
# in [0, 1], class numbers)
DARK = 16
_BYTES_PER_PIXEL = 8  # of an uncompressed file: four channels of 16 bits
_BYTES_BESIDE = 16 << 20  # for what a file holds beside its pixels
REDUCING_GAP = 3
CHECKED_EDGE = 256  # pixels that either edge of an image keeps where it is decoded only to see that it is whole
_ROWS_AT_ONCE = 256
_ORIENTATION, _FIRST_ON_ITS_SIDE = 0x0112, 5  # EXIF's tag, and of its eight values the first that swaps the edges
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode_image(data: bytes, image_size: int, max_pixels: int, where: str, framing: Framing = SQUARE) -> np.ndarray:
    """Decodes an image file's bytes.

    Args:
        image_size: edge of the square, in pixels.
        max_pixels: larger files are refused before they are decoded.
        where: file and sample, named in errors.
        framing: how it becomes a square.

    Returns:
        uint8 [3, image_size, image_size], RGB.

    Raises:
        InputError: empty, damaged, truncated, of another format than FORMATS, or too large.
    """
    image = open_rgb(data, max_pixels, where, at_least=REDUCING_GAP * (framing.shorter_edge or image_size))
    return frame_image(image, image_size, max_pixels, where, framing)


def frame_image(
    image: Image.Image, image_size: int, max_pixels: int, where: str, framing: Framing = SQUARE
) -> np.ndarray:
    """The square of an upright image in RGB, uint8 [3, image_size, image_size]. Arguments and errors as of
    `decode_image`."""
    edge = framing.shorter_edge
    width, height = image.size
    # Rounded down, as transformers does.
    scaled = (
        (image_size, image_size)
        if edge is None
        else (edge, edge * height // width)
        if width <= height
        else (edge * width // height, edge)
    )
    if image.size != scaled:
        if scaled[0] * scaled[1] > max_pixels:
            raise InputError(
                f"{where}: {width} x {height} pixels, which become {scaled[0]} x {scaled[1]} with a shorter edge of "
                f"{edge}: more than the allowed {max_pixels}"
            )
        image = image.resize(scaled, framing.resample)
    if edge is not None:
        left, top = (scaled[0] - image_size) // 2, (scaled[1] - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def open_rgb(data: bytes, max_pixels: int, where: str, *, at_least: int | None = None) -> Image.Image:
    """Decodes an image file's bytes, upright and in RGB; raises as `decode_image` does.

    Args:
        at_least: pixels that either edge must keep; a JPEG may then come smaller than it is. None: at its own size.
    """
    with _opened(io.BytesIO(data), len(data), max_pixels, where) as image:
        if at_least is not None and image.format == "JPEG":
            image.draft(None, (at_least, at_least))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def upright_rgb(image: Image.Image, max_pixels: int, where: str) -> Image.Image:
    """An image that a program has opened, upright and in RGB; it stays as it is. Raises InputError if it is too large
    or cannot be decoded."""
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{where}: {image.width} x {image.height} pixels, more than the allowed {max_pixels}; shrink it or "
            "raise the limit (max_image_pixels)"
        )
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as of a file, see `_opened`
        raise InputError(f"{where}: not a readable image ({str(error) or type(error).__name__})") from None


@contextlib.contextmanager
def _opened(stream: BinaryIO, num_bytes: int, max_pixels: int, where: str) -> Generator[Image.Image]:
    """Opens an image, of which only the header is read so far. Whatever Pillow raises in the block becomes an
    InputError."""
    # Pillow itself judges the size, before it decodes, also that of pictures inside pictures (icons, frames).
    Image.MAX_IMAGE_PIXELS = max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another package may have set it: what is missing would come grey
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
            if image.width * image.height > max_pixels:  # Pillow's warning may be another thread's to hear
                raise Image.DecompressionBombError(
                    f"Image size ({image.width * image.height} pixels) exceeds the limit"
                )
            yield image
    except _TOO_LARGE as error:
        found = str(error).partition(" exceeds")[0]  # "Image size (N pixels)"
        raise InputError(
            f"{where}: {found}, more than the allowed {max_pixels}; shrink it or raise the limit (max_image_pixels)"
        ) from None
    except UnidentifiedImageError:
        stream.seek(0)
        told = f"{num_bytes} bytes, the first {stream.read(8)!r}; expected {', '.join(FORMATS)}"
        raise InputError(f"{where}: not a readable image ({told})") from None
    except Exception as error:  # on damaged files Pillow's readers raise whatever their arithmetic happens to run into
        raise InputError(
            f"{where}: not a readable image ({num_bytes} bytes; {str(error) or type(error).__name__})"
        ) from None


def require_size(data: bytes, max_pixels: int, where: str) -> None:
    """Looks at the header of an image file's bytes alone. Raises InputError as `decode_image`, for what that tells."""
    with _opened(io.BytesIO(data), len(data), max_pixels, where):
        pass


def is_dark(data: bytes, max_pixels: int, where: str) -> bool:
    """Decodes an image to check it, and says whether it comes out dark though it is not black (see DARK). Raises as
    `open_rgb`.

    A JPEG is decoded at an eighth of its size, or what leaves `CHECKED_EDGE`: all of its bytes are read, so damage is
    found as at its own size, and where a mean of its values is light, one of them is. One that looks dark is decoded at
    its own size.
    """
    image = open_rgb(data, max_pixels, where, at_least=CHECKED_EDGE)
    middle: object = image.getpixel((image.width // 2, image.height // 2))
    if isinstance(middle, tuple) and max(middle) > DARK:  # as of most, which need not be looked through
        return False
    if _brightest(image) > DARK:
        return False
    brightest = _brightest(open_rgb(data, max_pixels, where))
    return brightest <= DARK and (brightest > 0 or _holds_light(data))


def _brightest(image: Image.Image) -> int:
    return int(np.max(image.getextrema()))  # [3, 2], the least and the most of each channel


def _holds_light(data: bytes) -> bool:
    """Whether an image that comes out black has a value above zero in its file."""
    extrema = np.asarray(Image.open(io.BytesIO(data), formats=FORMATS).getextrema())
    return bool(extrema.ndim == 1 and extrema[1] > 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """uint8 [height, width] of an image of deeper greys, where Pillow would clip to 255.

    Integers are 16-bit values; floats are taken as already in [0, 255].
    """
    values = np.asarray(image)
    grey = np.empty(values.shape, np.uint8)
    transparent = image.info.get("transparency")  # the one value that a PNG of greys may call so
    # by rows: the intermediate values take several times the image's memory
    for first in range(0, len(values), _ROWS_AT_ONCE):
        rows = values[first : first + _ROWS_AT_ONCE]
        if image.mode == "F":
            if not np.isfinite(rows).all():
                raise ValueError("holds a value that is NaN or infinite")
            scaled = np.clip(np.rint(rows), 0, 255)
        else:
            scaled = (np.clip(rows, 0, 65_535).astype(np.int32) + 128) // 257
        grey[first : first + _ROWS_AT_ONCE] = scaled
        if transparent is not None:
            grey[first : first + _ROWS_AT_ONCE][rows == transparent] = 255
    return grey


def read_image(path: Path, max_pixels: int, where: str, *, inside: Path | None) -> bytes:
    """The bytes of an image file.

    Args:
        max_pixels: a file too large for so many pixels is refused before it is read.
        where: sample and file, named in errors.
        inside: the folder below which the file must lie when all links are followed; None: anywhere.

    Raises:
        InputError: it cannot be read, is no plain file (and might never end), is too large, or lies elsewhere.
    """
    return read_image_and_status(path, max_pixels, where, inside=inside)[0]


def read_image_and_status(
    path: Path, max_pixels: int, where: str, *, inside: Path | None
) -> tuple[bytes, os.stat_result]:
    """As `read_image`, with the file's status from before it was read."""
    try:
        file, status = _plain_file(path, max_pixels, where, inside)
        with file:
            data = file.read(status.st_size + 1)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    found, expected = len(data), status.st_size
    if found != expected:
        raise InputError(
            f"{where}: changed while it was read ({expected:,} bytes, then "
            f"{found:,}{' or more' if found > expected else ''})"
        )
    return data, status


def require_image(path: Path, max_pixels: int, where: str, *, inside: Path | None) -> None:
    """Looks at an image file's header alone, which takes a hundredth of decoding it.

    Raises: InputError as `read_image` and `decode_image`, for what the header tells: that a file is cut short it does
    not.
    """
    try:
        file, status = _plain_file(path, max_pixels, where, inside)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    with file, _opened(file, status.st_size, max_pixels, where):
        pass


def sizes_below(folder: Path, max_pixels: int) -> Callable[[str], tuple[int, int]]:
    """name -> (height, width) of the image file in `folder` as `open_rgb` gives it, by its header. Raises InputError as
    `require_image`."""

    @functools.lru_cache(maxsize=1 << 16)
    def size_of(name: str) -> tuple[int, int]:
        where = f"image {folder / name}"
        try:
            file, status = _plain_file(folder / name, max_pixels, where, folder)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror})") from None
        with file, _opened(file, status.st_size, max_pixels, where) as image:
            width, height = image.size
            # Pillow gives a TIFF's size upright already, before it is turned.
            turned = image.format != "TIFF" and _exif_of(image, file).get(_ORIENTATION, 1) >= _FIRST_ON_ITS_SIDE
        return (width, height) if turned else (height, width)

    return size_of


def _exif_of(image: Image.Image, file: BinaryIO) -> Image.Exif:
    """Of a PNG, Pillow decodes the whole picture to look behind it, where hardly any has anything."""
    if image.format == "PNG" and not _says_more_behind(file):
        return Image.Image.getexif(image)
    return image.getexif()


def _says_more_behind(file: BinaryIO) -> bool:
    """Whether a PNG file has a chunk of text or EXIF behind its pixels. The place in the file stays."""
    place, behind_pixels = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            behind_pixels = behind_pixels or kind == b"IDAT"
            if behind_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _plain_file(path: Path, max_pixels: int, where: str, inside: Path | None) -> tuple[BinaryIO, os.stat_result]:
    """An open file that `read_image` may read, and its status. Raises InputError for another one, and OSError."""
    # Without O_NONBLOCK a named pipe would wait for its writer.
    file, status = plain_image(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), max_pixels, where)
    try:
        if inside is not None:
            _require_inside(path, inside, where)
    except BaseException:
        file.close()
        raise
    return file, status


def plain_image(descriptor: int, max_pixels: int, where: str) -> tuple[BinaryIO, os.stat_result]:
    """The file of an open descriptor and its status, if it is a plain one and no larger than an image of so many
    pixels; else it is closed.

    Raises: InputError.
    """
    limit = _BYTES_PER_PIXEL * max_pixels + _BYTES_BESIDE
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{where}: not a regular file, expected an image")
        if status.st_size > limit:
            allowed = f"the {limit:,} that an image of {max_pixels:,} pixels can take (max_image_pixels)"
            raise InputError(f"{where}: the file has {status.st_size:,} bytes, more than {allowed}")
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb"), status


def _require_inside(path: Path, folder: Path, where: str) -> None:
    parent, name = os.path.split(path)
    place = os.path.join(_real(parent), name)
    if os.path.islink(place):
        place = os.path.realpath(place)
    root = _real(str(folder))
    if place != root and not place.startswith(root.rstrip("/") + "/"):
        raise InputError(
            f"{where}: a link leads out of {folder}, to {place}; put the file itself there (cp -L), or name a "
            "folder that holds both"
        )


def _real(folder: str) -> str:
    return _resolved(os.path.join(os.getcwd(), folder))  # which may be another the next time


@functools.lru_cache(maxsize=1 << 12)  # of many images' one
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)
