"""The files of samples that are packed: one, or several sets' together, whose samples and images are `SET/NAME`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.packed_images import decoded_before
from data_prep.parts import Share
from data_prep.tokens import Tokens, tokenised
from vltrain.config.mixture import SET_NAME
from vltrain.data.origin import SAMPLES_FILE, read_prepared
from vltrain.data.text.encoder import SampleEncoder
from vltrain.errors import InputError
from vltrain.files.record import FILE, FOLDER, FileRecord, Seen, digest_of, look, stat_of

Given = Path | Mapping[str, Path]
"""A file, or several by the names of their sets."""


def read_given(texts: list[str]) -> Given:
    """`FILE`, or two and more `SET=FILE`. Raises InputError for what is neither, and for a set or file named twice."""
    if len(texts) == 1:
        return Path(texts[0])
    found: dict[str, Path] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator or not file or not SET_NAME.fullmatch(name):
            raise InputError(f"--samples: found '{text}', expected SET=FILE where files of several sets are packed")
        if name in found:
            raise InputError(f"--samples: set '{name}' comes twice; give each file a name of its own")
        found[name] = Path(file)
    return found


@dataclass(frozen=True)
class SampleFile:
    """A file as it was `before` it is packed, its `size` in bytes; `name` of its set, "" of a file alone."""

    name: str
    path: Path
    before: Seen
    size: int

    def told(self, text: str) -> str:
        """What a sample or an image of this file is called in the packs."""
        return f"{self.name}/{text}" if self.name else text

    def named(self, tokens: Tokens) -> Tokens:
        """The same under the names that they have in the packs."""
        if not self.name:
            return tokens
        images = [tuple(self.told(image) for image in shown) for shown in tokens.images]
        return replace(tokens, ids=[self.told(one) for one in tokens.ids], images=images)


class SampleFiles:
    """All that are packed together, in their order."""

    def __init__(self, given: Given) -> None:
        """Raises InputError for one that is no file, and for the same file under two names."""
        named = {"": given} if isinstance(given, Path) else dict(given)
        self.files = [_opened(name, path) for name, path in named.items()]
        places: dict[Path, str] = {}
        for file in self.files:
            other = places.setdefault(file.path.resolve(), file.name)
            if other != file.name:
                raise InputError(f"{file.path}: is named twice, as '{other}' and '{file.name}'; leave one out")

    @property
    def roots(self) -> dict[str, Path]:
        """By set, the folder that its images' paths are relative to."""
        return {file.name: file.path.parent for file in self.files}

    def tokens(
        self, encoder: SampleEncoder, max_pixels: int, workers: int, share: Share | None = None
    ) -> Iterator[Tokens]:
        """The samples' tokens, or a part's: its share of the bytes of all files, one after another."""
        start, total = 0, sum(file.size for file in self.files)
        first, last = (0, total) if share is None or share.part is None else share.bounds(share.part, total)
        for file in self.files:
            span = max(first - start, 0), min(last - start, file.size)
            if span[0] < span[1]:
                yield from map(file.named, tokenised(file.path, encoder, max_pixels, workers, span))
            start += file.size

    def decoded(self, max_pixels: int) -> dict[str, bytes]:
        """`decoded_before` of all folders."""
        return {
            file.told(name): digest
            for file in self.files
            for name, digest in decoded_before(file.path.parent, max_pixels).items()
        }

    def require_unchanged(self) -> None:
        """Raises InputError for one that is not what it was."""
        for file in self.files:
            if stat_of(file.path) != file.before.stat and look(file.path).digest != file.before.digest:
                raise InputError(f"{file.path}: was changed while it was packed; pack again when it is whole")

    def add_to(self, record: FileRecord) -> None:
        """Adds the files to the record of what packs were made from."""
        for file in self.files:
            record.add(SAMPLES_FILE, file.name or ".", file.before)

    def origin(self) -> dict[str, Any]:
        """The fields of `MadeFrom` that tell the samples."""
        sets = {file.name: _origin_of(file) for file in self.files}
        if "" in sets:
            return sets[""]
        provenance = {f"{name}.{key}": text for name, one in sets.items() for key, text in one["provenance"].items()}
        return {
            "name": ", ".join(f"{name}={one['name']}" for name, one in sets.items()),
            "samples": digest_of("\n".join(f"{name} {one['samples']}" for name, one in sets.items()).encode()).hex(),
            "source": ", ".join(f"{name}: {one['source'] or 'samples'}" for name, one in sets.items()),
            "provenance": provenance,
            "sets": {name: {key: one[key] for key in ("name", "samples", "prepared")} for name, one in sets.items()},
        }


def _opened(name: str, path: Path) -> SampleFile:
    before = look(path)
    if before.kind != FILE:
        raise InputError(
            f"{path}: cannot be read ({'it is a folder' if before.kind == FOLDER else 'no such file'}), "
            "expected a file of samples"
        )
    return SampleFile(name, path, before, path.stat().st_size)


def _origin_of(file: SampleFile) -> dict[str, Any]:
    prepared = read_prepared(file.path.parent)
    known = prepared if prepared is not None and prepared.samples is not None else None
    return {
        "name": file.path.name,
        "samples": file.before.digest.hex(),
        "prepared": known.samples if known is not None else None,
        "source": known.name() if known is not None else None,
        "provenance": known.provenance if known is not None else {},
    }
