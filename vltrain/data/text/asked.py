"""How a split's questions are put: what they all begin and end with, and whether they come in conversations and always
with images.

A model that was tuned on "Question: ...\\nAnswer:" answers a bare question badly, and one that never saw a second
question in a conversation answers it badly too. So a run remembers (`run.json`) what its training questions had in
common, and who asks it afterwards gets it right. A hundred lines, evenly spaced over the file, are looked at: what they
have in common says nothing certain of the others, and need not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.data.text.pieces import MARKER
from vltrain.errors import InputError
from vltrain.files.strict_json import is_object, parse_json
from vltrain.schema import Sample

LOOKED_AT = 100
FEWEST = 10  # different questions that are needed before something counts as common
_ENDS_BEGIN = (":", "\n")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """begin, end: what stands before and behind each question, "" where that differs; multi_turn: some samples hold
    several questions;
    images: each sample shows one."""

    begin: str = ""
    end: str = ""
    multi_turn: bool = True
    images: bool = False

    def phrase(self, question: str) -> str:
        """A question as the training's were put; one that is put so already stays as it is."""
        if question.startswith(self.begin) and question.endswith(self.end):
            return question
        return f"{self.begin}{question.strip()}{self.end}"

    @classmethod
    def from_json(cls, record: Any) -> Asked | None:
        """What `run.json` says; None where it says nothing of the kind."""
        kinds = {"begin": str, "end": str, "multi_turn": bool, "images": bool}
        sound = (
            is_object(record)
            and record.keys() == kinds.keys()
            and all(type(record[name]) is kind for name, kind in kinds.items())
        )
        return cls(**record) if sound else None


def how_asked(file: Path) -> Asked | None:
    """How the questions of a file of samples are put; None where it cannot be read."""
    try:
        samples = [Sample.from_json(parse_json(line, str(file)), str(file)) for line in _spread(file)]
    except (InputError, OSError):
        return None
    if not samples:
        return None
    first = [next(turn.text for turn in sample.turns if turn.role == "user") for sample in samples]
    begin, end = _in_common(sorted({"".join(MARKER.split(text)).strip() for text in first}))
    return Asked(
        begin=begin,
        end=end,
        images=all(sample.images for sample in samples),
        multi_turn=any(sum(turn.role == "user" for turn in sample.turns) > 1 for sample in samples),
    )


def in_common(sets: Sequence[Asked]) -> Asked | None:
    """How the questions of several sets are put, as far as all are put so; None of no set."""
    if not sets:
        return None
    begins, ends = {one.begin for one in sets}, {one.end for one in sets}
    return Asked(
        begin=begins.pop() if len(begins) == 1 else "",
        end=ends.pop() if len(ends) == 1 else "",
        multi_turn=any(one.multi_turn for one in sets),
        images=all(one.images for one in sets),
    )


def _spread(file: Path) -> Iterator[bytes]:
    """At most LOOKED_AT lines, evenly spaced over the file by bytes, none twice."""
    with file.open("rb") as stream:
        size, behind = os.fstat(stream.fileno()).st_size, 0
        for number in range(LOOKED_AT):
            start = number * size // LOOKED_AT
            if start > behind:
                stream.seek(start - 1)
                stream.readline()  # the rest of a line
            line = stream.readline()
            behind = stream.tell()
            if line.strip():
                yield line


def _in_common(texts: list[str]) -> tuple[str, str]:
    """(begin, end) of all texts, cut at the end of a label or a line, so that a word that happens to be in all of them
    does not count."""
    if len(texts) < FEWEST:
        return "", ""
    begin = os.path.commonprefix(texts)
    while begin and not (begin[-1].isspace() and begin.rstrip(" ")[-1:] in _ENDS_BEGIN):
        begin = begin[:-1]
    rest = [text[len(begin) :] for text in texts]
    end = os.path.commonprefix([text[::-1] for text in rest])[::-1]
    place = next((place for place, one in enumerate(end) if one.isspace()), len(end))
    end = end[place:]
    return begin, end if end.startswith("\n") or end.endswith(":") else ""
