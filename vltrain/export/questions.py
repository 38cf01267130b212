"""The questions of samples as users would ask them."""

from __future__ import annotations

import re
from typing import Any

from vltrain.data.pieces import MARKER, system_in_question
from vltrain.schema import IMAGE_MARKER, Sample, unescape_markers

_FRONT = re.compile(rf"(?:{re.escape(IMAGE_MARKER)}\n?)*")


def as_asked(sample: Sample) -> Any:
    """A text where one is enough (its images then stand in front), else a conversation: [{"role", "content"}], with `<image>` places."""
    turns = sample.turns[:-1]
    if len(turns) == 1:
        front = _FRONT.match(turns[0].text)
        assert front is not None, "it matches nothing, too"
        text = turns[0].text[front.end() :]
        if IMAGE_MARKER not in text and front[0] == f"{IMAGE_MARKER}\n" * len(sample.images) and text:
            return text
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def as_text(sample: Sample) -> str:
    """The question alone, without the places of its images: what an InstructBLIP is asked."""
    return "".join(map(unescape_markers, MARKER.split(system_in_question(sample.turns)[0].text))).strip()
