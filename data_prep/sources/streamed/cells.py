"""Images in the cells of a table: bytes, the library's `Image`, paths and addresses, or lists of those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.raw import Embedded, ImageSource
from data_prep.sources.streamed.fetched import Fetched, Limits
from vltrain.errors import InputError
from vltrain.files.record import digest_of
from vltrain.files.strict_json import is_list, is_object, shown
from vltrain.schema import path_fault

EXPECTED = "an image: bytes, the library's Image, a path, or a list of those"
_MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"RIFF": ".webp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hub, read when it is asked for."""

    address: str
    most_bytes: int

    def __call__(self) -> bytes:
        from data_prep.sources.streamed.faults import one_line_errors

        with one_line_errors(self.address):
            import fsspec

            with fsspec.open(self.address, "rb") as stream:
                data: bytes = stream.read(self.most_bytes + 1)
        if len(data) > self.most_bytes:
            raise InputError(f"{self.address}: larger than {self.most_bytes:,} bytes (url_megabytes=)")
        return data


@dataclass(frozen=True)
class Cells:
    """How images in cells are found.

    folder    which paths are relative to; None: they are files of the Hub's data set
    address   of that one, hf://datasets/NAME@COMMIT
    limits    within which addresses are fetched; None: they are not
    """

    folder: Path | None
    address: str | None
    limits: Limits | None
    most_bytes: int

    def named(self, cell: Any, where: str) -> list[tuple[str, ImageSource]]:
        """(name, source) of each image in a cell, none of an empty one. Raises InputError for what is no image, and for
        a path that leads out of the folder."""
        return list(self._named(cell, where))

    def _named(self, cell: Any, where: str) -> Iterator[tuple[str, ImageSource]]:
        if cell is None or cell == "":
            return
        if is_list(cell):
            for number, one in enumerate(cell):
                yield from self._named(one, f"{where}[{number}]")
        elif isinstance(cell, bytes):
            yield _embedded(cell, "", where)
        elif is_object(cell) and {"bytes", "path"} & cell.keys():
            path: Any = cell.get("path")
            data: Any = cell.get("bytes")
            if data is not None and not isinstance(data, bytes):
                raise InputError(f"{where}.bytes: found {shown(data)}, expected bytes")
            if data is not None:
                yield _embedded(data, path if isinstance(path, str) else "", where)
            elif path is not None:
                yield self._of_path(path, where)
        elif isinstance(cell, str):
            yield self._of_path(cell, where)
        else:
            raise InputError(f"{where}: found {shown(cell)}, expected {EXPECTED}")

    def _of_path(self, path: Any, where: str) -> tuple[str, ImageSource]:
        if not isinstance(path, str):
            raise InputError(f"{where}.path: found {shown(path)}, expected a file's name")
        if path.startswith("data:"):
            raise InputError(f"{where}: found {path!r:.40}, expected {EXPECTED}; decode it to bytes first")
        if path.startswith(("http://", "https://")):
            if self.limits is None:
                raise InputError(
                    f"{where}: found the address {path!r:.120}, and addresses are not fetched; download "
                    "the images, or say urls=fetch"
                )
            digest = digest_of(path.encode("utf-8", "surrogatepass")).hex()
            return f"fetched/{digest[:2]}/{digest}{_suffix_of(path.partition('?')[0])}", Fetched(path, self.limits)
        if self.address is not None:
            name = path.removeprefix(f"{self.address}/")
            _require_inside(name, where)
            return name, HubFile(f"{self.address}/{name}", self.most_bytes)
        assert self.folder is not None
        if path.startswith(f"{self.folder}/"):  # as the library gives those of an imagefolder
            path = path[len(str(self.folder)) + 1 :]
        _require_inside(path, where)
        return path, self.folder / path


def _require_inside(name: str, where: str) -> None:
    if "://" in name:
        raise InputError(f"{where}: found {name!r:.120}, expected a path, or an address with http or https")
    if (fault := path_fault(name)) is not None:
        raise InputError(f"{where}: found the path {name!r:.120}, which {fault}")


def _embedded(data: bytes, path: str, where: str) -> tuple[str, Embedded]:
    """By its digest: equal images of many rows are one file."""
    if not data:
        raise InputError(f"{where}: found no bytes, expected an image")
    source = Embedded.of(data)
    digest = source.digest.hex()
    suffix = next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), _suffix_of(path))
    return f"{digest[:2]}/{digest}{suffix}", source


def _suffix_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ""
