"""The images of samples that are packed: read in several processes, decoded unless preparing the samples did that, and
recorded with their digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from data_prep.copied_images import warn_of_dark_images
from data_prep.parallel import in_chunks, ordered_map
from data_prep.steps.written import IMAGES
from vltrain.console import Progress
from vltrain.data.images import is_dark, read_image_and_status
from vltrain.data.origin import SAMPLES, SAMPLES_RECORD, read_prepared
from vltrain.errors import InputError
from vltrain.files.record import FILE, FileRecord, Seen, digest_of, read_record, stat_in

_IMAGES_PER_CHUNK = 16
Wanted = tuple[int, str, str]
"""An image's number, its path below the samples' folder, and a sample that shows it."""


def decoded_before(folder: Path, max_pixels: int) -> dict[str, bytes]:
    """Digests of the images in a folder of samples that were decoded when those were prepared, under no larger limit,
    by name. Empty where no record says so."""
    with suppress(InputError):  # of a damaged record: its images are decoded again
        made = read_prepared(folder)
        if made is not None and not made.adopted and (made.max_image_pixels or max_pixels + 1) <= max_pixels:
            record = read_record(folder / SAMPLES_RECORD, made.files)
            rows = zip(record.places, record.names, record.digests, strict=True)
            # what else lies there, the samples, is no image
            return {name: digest for place, name, digest in rows if place == SAMPLES and name.startswith(f"{IMAGES}/")}
    return {}


class PackedImages:
    """Those below `roots`, by set: of set a, image x is a/x; of "", the only one, x. `record`: of all that were read;
    `decoded`: digests by name, of those that were decoded before and are not decoded again while they are what they
    were."""

    def __init__(self, roots: Mapping[str, Path], workers: int, max_pixels: int, decoded: Mapping[str, bytes]) -> None:
        self._roots = dict(roots)
        self._decoded = decoded
        self.record = FileRecord()
        self._workers, self._max_pixels = workers, max_pixels
        self._expected: dict[str, bytes] | None = None

    def anew(self) -> PackedImages:
        """The same folders, of which nothing has been read."""
        return PackedImages(self._roots, self._workers, self._max_pixels, self._decoded)

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
            in_chunks(((*one, self._decoded.get(one[1])) for one in wanted), _IMAGES_PER_CHUNK),
            self._workers,
            (self._roots, self._max_pixels, decode),
        )
        dark: list[str] = []
        with Progress(total=len(wanted), title="images", unit="image") as progress:
            for chunk, found in checked:
                for ref, name, data, seen in chunk:
                    if self._expected is not None and self._expected.get(name) != seen.digest:
                        place = "/".join(map(str, _place_of(name, self._roots)))
                        raise InputError(
                            f"{place}: was changed since a part decoded it; remove the parts and run them again"
                        )
                    self.record.add(SAMPLES, name, seen)
                    yield ref, data
                dark += found
                progress.update(len(chunk))
        warn_of_dark_images(dark)


def _check_images(
    wanted: list[tuple[int, str, str, bytes | None]], roots: dict[str, Path], max_pixels: int, decode: bool
) -> tuple[list[tuple[int, str, bytes, Seen]], list[str]]:
    """Reads images and, if `decode`, decodes those that have not the digest given; returns them with what was seen of
    their files, and the paths of those that come out dark."""
    checked: list[tuple[int, str, bytes, Seen]] = []
    dark: list[str] = []
    for ref, name, sample_id, known in wanted:
        folder, path = _place_of(name, roots)
        if path.startswith("/") or ".." in path.split("/"):
            raise InputError(
                f"sample '{sample_id}': image path '{path}' leads out of {folder}; paths are relative to the "
                "samples' folder"
            )
        where = f"sample '{sample_id}', image {folder / path}"
        data, status = read_image_and_status(folder / path, max_pixels, where, inside=folder)
        digest = digest_of(data)
        if decode and digest != known and is_dark(data, max_pixels, where):
            dark.append(name)
        checked.append((ref, name, data, Seen(FILE, digest, stat_in(status))))
    return checked, dark


def _place_of(name: str, roots: Mapping[str, Path]) -> tuple[Path, str]:
    """The folder that an image lies below, and its path there."""
    if "" in roots:
        return roots[""], name
    one, _, path = name.partition("/")
    return roots[one], path
