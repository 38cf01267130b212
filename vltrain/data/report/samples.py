"""The samples of a recipe's splits, as far as they are compared: a few hundred bytes each, whatever they say.

Of a split of more than `MOST_SAMPLES`, so many are drawn, the same ones every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vltrain.data.report.texts import digest_of, normalised, sketch_of
from vltrain.errors import InputError
from vltrain.files.strict_json import is_blank, parse_line, require_plain_file
from vltrain.schema import Sample, unescape_markers

MOST_SAMPLES = 100_000


@dataclass(kw_only=True)
class Split:
    """Samples of a split, in the order of its file.

    total    samples in the file, all of them or as many more than are here
    asked    of each, digest of what is said before the last answer (`normalised`)
    said     of each, digest of its last answer
    answers  of each, its last answer
    spoken   of each, all of its answers
    facts    of each, what the scorer knows of it (`Sample.metadata`)
    images   of each, the files that it shows
    sketches of each distinct question (its digest) that is long enough to be nearly another's, `sketch_of` it
    """

    name: str
    file: Path
    total: int = 0
    ids: list[str] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    spoken: list[tuple[str, ...]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    images: list[tuple[Path, ...]] = field(default_factory=list)
    sketches: dict[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> str:
        """How many samples are looked at, in words."""
        return f"{len(self):,} of {self.total:,} samples" if len(self) < self.total else f"{self.total:,} samples"


def read_split(name: str, file: Path, most: int = MOST_SAMPLES) -> Split:
    """A split's samples. Raises InputError for a file that cannot be read and for a malformed sample."""
    split = Split(name=name, file=file)
    folder, files = file.parent, dict[str, Path]()
    split.total = sum(1 for _ in lines_of(file))
    for number, line in _chosen(file, split.total, most):
        sample = Sample.from_json(parse_line(line, str(file), number), f"{file}:{number}")
        asked = normalised("\n".join(unescape_markers(turn.text) for turn in sample.turns[:-1]))
        answer = unescape_markers(sample.turns[-1].text)
        question = digest_of(asked)
        if question not in split.sketches and (sketch := sketch_of(asked)) is not None:
            split.sketches[question] = sketch
        split.ids.append(sample.id)
        split.asked.append(question)
        split.said.append(digest_of(normalised(answer)))
        split.answers.append(answer)
        split.spoken.append(tuple(unescape_markers(turn.text) for turn in sample.turns if turn.role == "assistant"))
        split.facts.append(sample.metadata)
        split.images.append(tuple(files.setdefault(image, folder / image) for image in sample.images))
    return split


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of samples that are not blank, by number. Raises InputError for one that cannot be read."""
    require_plain_file(file, "prepared samples (vltrain prepare), or samples of your own, as JSON Lines")
    try:
        with file.open("rb") as stream:
            yield from ((number, line) for number, line in enumerate(stream, start=1) if not is_blank(line, number))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _chosen(file: Path, total: int, most: int) -> Iterator[tuple[int, bytes]]:
    if total <= most:
        yield from lines_of(file)
        return
    places = iter(np.sort(np.random.default_rng(0).choice(total, most, replace=False)).tolist())
    wanted = next(places)
    for place, numbered in enumerate(lines_of(file)):
        if place == wanted:
            yield numbered
            wanted = next(places, -1)
