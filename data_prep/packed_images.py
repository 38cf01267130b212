"""The images of samples that are packed: read and decoded once, in several processes, and recorded with their
digests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.copied_images import warn_of_dark_images
from data_prep.parallel import in_chunks, ordered_map
from vltrain.console import Progress
from vltrain.data.images import is_dark, read_image_and_status
from vltrain.data.origin import SAMPLES
from vltrain.errors import InputError
from vltrain.files.record import FILE, FileRecord, Seen, digest_of, stat_in

_IMAGES_PER_CHUNK = 16
Wanted = tuple[int, str, str]
"""An image's number, its path below the samples' folder, and a sample that shows it."""


class PackedImages:
    """Those below `root`. `record`: of all that were read."""

    def __init__(self, root: Path, workers: int, max_pixels: int) -> None:
        self.root = root
        self.record = FileRecord()
        self._workers, self._max_pixels = workers, max_pixels
        self._expected: dict[str, bytes] | None = None

    def expect(self, checked: FileRecord) -> None:
        """What a part has decoded is not decoded again, but must still be what it was."""
        self._expected = {} if self._expected is None else self._expected
        self._expected.update(zip(checked.names, checked.digests, strict=True))

    def read(self, wanted: list[Wanted]) -> Iterator[tuple[int, bytes]]:
        """Numbers and file bytes, in order. Raises InputError for an image that is missing, damaged, outside the
        folder, or changed."""
        decode = self._expected is None
        checked = ordered_map(
            _check_images,
            in_chunks(wanted, _IMAGES_PER_CHUNK),
            self._workers,
            (str(self.root), self._max_pixels, decode),
        )
        dark: list[str] = []
        with Progress(total=len(wanted), title="images", unit="image") as progress:
            for chunk, found in checked:
                for ref, name, data, seen in chunk:
                    if self._expected is not None and self._expected.get(name) != seen.digest:
                        raise InputError(
                            f"{self.root / name}: was changed since a part decoded it; remove the parts and run "
                            "them again"
                        )
                    self.record.add(SAMPLES, name, seen)
                    yield ref, data
                dark += found
                progress.update(len(chunk))
        warn_of_dark_images(dark)


def _check_images(
    wanted: list[Wanted], root: str, max_pixels: int, decode: bool
) -> tuple[list[tuple[int, str, bytes, Seen]], list[str]]:
    """Reads and, if `decode`, decodes images; returns them with what was seen of their files, and the paths of those
    that come out dark."""
    checked: list[tuple[int, str, bytes, Seen]] = []
    dark: list[str] = []
    folder = Path(root)
    for ref, name, sample_id in wanted:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"sample '{sample_id}': image path '{name}' leads out of {folder}; paths are relative to the "
                "samples' folder"
            )
        where = f"sample '{sample_id}', image {folder / name}"
        data, status = read_image_and_status(folder / name, max_pixels, where, inside=folder)
        if decode and is_dark(data, max_pixels, where):
            dark.append(name)
        checked.append((ref, name, data, Seen(FILE, digest_of(data), stat_in(status))))
    return checked, dark
