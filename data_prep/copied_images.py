"""Images of samples: decoded once, and copied or drawn into the folder of the samples."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
from pathlib import Path

from data_prep.sources.raw import ImageSource
from vltrain.data.images import DARK, is_dark, read_image_and_status
from vltrain.errors import InputError
from vltrain.files.record import digest_of, stat_in

Images = dict[str, tuple[ImageSource, str]]
"""Per image name its source and the first sample that uses it."""
Named = tuple[str, tuple[ImageSource, str]]
"""An item of those."""
Done = tuple[str, str | None, bytes, tuple[int, int, int, int] | None, tuple[int, int, int, int]]
"""An image's name, its file if it has one, its digest, and the stats of file and copy."""

logger = logging.getLogger(__name__)


def copy_or_draw(
    images: list[Named], folder: Path, max_pixels: int, roots: tuple[Path, ...]
) -> tuple[list[Done], list[str]]:
    """Copies each image file into `folder`, or draws there what is to be drawn, and decodes it once. Returns also the
    files that come out dark."""
    done: list[Done] = []
    dark: list[str] = []
    made = ""  # the folder that is known to be there
    for name, (source, sample_id) in images:
        path, before = None, None
        if isinstance(source, Path):
            path = str(source)
            where = f"sample '{sample_id}', image {path}"
            root = _root_of(os.path.dirname(path), roots)
            data, status = read_image_and_status(source, max_pixels, where, inside=root)
            before = stat_in(status)
            if is_dark(data, max_pixels, where):
                dark.append(path)
        else:
            try:
                data = source()
            except InputError as error:  # of one that is fetched
                raise InputError(f"sample '{sample_id}': {error}") from None
            if is_dark(data, max_pixels, f"sample '{sample_id}', image {name}"):
                dark.append(name)
        copy = f"{folder}/{name}"
        if (parent := os.path.dirname(copy)) != made:
            os.makedirs(parent, exist_ok=True)
            made = parent
        with open(copy, "wb") as file:
            file.write(data)
            file.flush()
            written = stat_in(os.fstat(file.fileno()))
        done.append((name, path, digest_of(data), before, written))
    return done, dark


@functools.lru_cache(maxsize=1 << 12)  # of many images' one
def _root_of(folder: str, roots: tuple[Path, ...]) -> Path | None:
    """The innermost of `roots` below which the folder lies, as it is written."""
    below = (root for root in roots if Path(folder).is_relative_to(root))
    return max(below, key=lambda root: len(root.parts), default=None)


def link_or_copy(source: Path, target: Path) -> None:
    """For a part's own files, which are removed afterwards: a merge that dies leaves them as they were."""
    if not os.path.isdir(target.parent):  # of many images' one mostly is there: asking takes a tenth of making
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def warn_of_dark_images(names: list[str]) -> None:
    """Warns of images that are all but black, if there are any."""
    if names:
        why = (
            f"no value above {DARK} of 255: 12-bit values in 16 bits, floats in [0, 1] or class numbers are not "
            "stretched"
        )
        logger.warning(
            "images: %d decode(s) to a dark image (%s): %s",
            len(names),
            why,
            ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
        )
