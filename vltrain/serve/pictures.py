"""The images of a request: data URLs, and files below one folder if that is allowed. Nothing is ever fetched from the
network.

A file is opened folder by folder from the allowed one on, none of them a link any more, so that no link, however late
it is swapped in, leads out of it. Its size is judged before it is read, an image's pixels before it is decoded.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vltrain.data.images import plain_image, require_size
from vltrain.errors import InputError
from vltrain.schema import path_fault
from vltrain.serve.errors import ApiError, bad_request

_BASE64 = ";base64"
MAX_URL_CHARACTERS = 8192  # of one that is no data URL


class ImageReader:
    """Turns the URLs of a request into bytes of image files.

    Args:
        folder: below which files may be named; None: none may.
        max_pixels: of one image; larger ones are refused by their header.
    """

    def __init__(self, folder: Path | None, max_pixels: int) -> None:
        self._folder = None if folder is None else Path(os.path.realpath(folder))
        self._max_pixels = max_pixels

    def read(self, url: str, where: str) -> bytes:
        """The bytes of one image's file, of which the header alone was looked at. Raises ApiError naming `where`."""
        try:
            data = _decoded(url, where) if url[:5].lower() == "data:" else self._file(url, where)
            require_size(data, self._max_pixels, where)
        except InputError as error:
            raise bad_request(str(error), where, "invalid_image") from None
        return data

    def _file(self, url: str, where: str) -> bytes:
        scheme = url.partition(":")[0].lower() if ":" in url.partition("/")[0] else ""
        if scheme in ("http", "https"):
            raise bad_request(
                f"{where}: this server fetches nothing from the network; send the image itself, as a data URL",
                where,
                "invalid_image_url",
            )
        if scheme not in ("", "file"):
            expected = "expected a data URL (data:image/png;base64,...)"
            raise bad_request(
                f"{where}: found a URL with the scheme {scheme[:40]!r}, {expected}", where, "invalid_image_url"
            )
        if self._folder is None:
            told = (
                f"{where}: this server reads no files (it was started without --images FOLDER); send the image "
                "itself, as a data URL"
            )
            raise bad_request(told, where, "files_not_allowed")
        if len(url) > MAX_URL_CHARACTERS:
            raise bad_request(
                f"{where}: a path of {len(url):,} characters, expected {MAX_URL_CHARACTERS:,} at most",
                where,
                "invalid_image_url",
            )
        relative = self._relative(url, where) if scheme == "file" else url
        fault = path_fault(relative)
        if fault is not None:
            raise bad_request(
                f"{where}: the path {relative[:200]!r} {fault}; expected one below the folder of --images",
                where,
                "invalid_image_url",
            )
        return self._read_below(relative, where)

    def _relative(self, url: str, where: str) -> str:
        """The path of a file:// URL, relative to the folder."""
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise bad_request(
                f"{where}: found {url[:200]!r}, expected file:///PATH of this machine", where, "invalid_image_url"
            )
        path, root = unquote(parts.path, errors="surrogateescape"), str(self._folder)
        if path != root and not path.startswith(root.rstrip("/") + "/"):
            raise bad_request(f"{where}: the file is not below the folder of --images", where, "invalid_image_url")
        return path[len(root.rstrip("/")) + 1 :]

    def _read_below(self, relative: str, where: str) -> bytes:
        assert self._folder is not None
        try:
            place = os.path.realpath(self._folder / relative)
            if place == str(self._folder) or not place.startswith(str(self._folder).rstrip("/") + "/"):
                raise bad_request(f"{where}: a link leads out of the folder of --images", where, "invalid_image_url")
            file, status = plain_image(
                _open_below(self._folder, Path(place).relative_to(self._folder)), self._max_pixels, where
            )
            with file:
                return file.read(status.st_size)  # no more, should it grow meanwhile
        except (OSError, ValueError) as error:  # a name may be none for the file system
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or "no name of a file"
            raise bad_request(
                f"{where}: {relative[:200]!r}: cannot be read ({reason})", where, "invalid_image_url"
            ) from None


def _decoded(url: str, where: str) -> bytes:
    """What a data URL holds."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(_BASE64):
        raise _no_data_url(head, where)
    kind = head[5 : -len(_BASE64)].partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/"):
        raise bad_request(
            f"{where}: found data of the type {kind[:60]!r}, expected an image (data:image/png;base64,...)",
            where,
            "invalid_image_url",
        )
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(
            f"{where}: the data URL is no whole base64 text ({error}); was it cut short?", where, "invalid_image_url"
        ) from None
    if not data:
        raise bad_request(f"{where}: the data URL is empty, expected an image", where, "invalid_image_url")
    return data


def _no_data_url(head: str, where: str) -> ApiError:
    return bad_request(
        f"{where}: found {head[:60]!r}, expected data:image/png;base64,... (or another format than PNG)",
        where,
        "invalid_image_url",
    )


def _open_below(folder: Path, relative: Path) -> int:
    """A file's descriptor, for reading; none of the folders on the way, and not the file, may be a link. Raises
    OSError."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in relative.parts[:-1]:
            following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
            os.close(place)
            place = following
        # Without O_NONBLOCK a named pipe would wait for its writer.
        return os.open(relative.name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    finally:
        os.close(place)
