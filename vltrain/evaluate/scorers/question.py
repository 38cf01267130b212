"""What scorers see of a sample."""

from __future__ import annotations

from vltrain.evaluate.scorers.scoring import Question
from vltrain.schema import Sample, unescape_markers


def question_of(sample: Sample, where: str) -> Question:
    """What a scorer may know of a sample of the file `where`."""
    return Question(
        id=sample.id,
        reference=unescape_markers(sample.turns[-1].text),
        metadata=sample.metadata,
        has_image=bool(sample.images),
        where=f"{where}: sample '{sample.id}'",
    )


def prompt_text(sample: Sample) -> str:
    """What was asked, for people to read: all turns before the answer."""
    return "\n".join(turn.text for turn in sample.turns[:-1])
