"""The questions of samples as users would ask them."""

from __future__ import annotations

from typing import Any

from vltrain.data.text.pieces import MARKER, split_front_images, system_in_question
from vltrain.schema import IMAGE_MARKER, Sample, unescape_markers


def as_asked(sample: Sample) -> Any:
    """A text where one is enough (its images then stand in front), else a conversation: [{"role", "content"}], with
    `<image>` places."""
    turns = sample.turns[:-1]
    if len(turns) == 1:
        front, text = split_front_images(turns[0].text)
        if IMAGE_MARKER not in text and front == f"{IMAGE_MARKER}\n" * len(sample.images) and text:
            return text
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def as_text(sample: Sample) -> str:
    """The question alone, without the places of its images: what an InstructBLIP is asked."""
    return "".join(map(unescape_markers, MARKER.split(system_in_question(sample.turns)[0].text))).strip()
