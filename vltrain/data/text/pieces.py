"""What a template makes of a sample's turns: consecutive tokens that are all predicted or all given."""

from __future__ import annotations

import re
from typing import NamedTuple

from vltrain.schema import IMAGE_MARKER, SYSTEM, Turn

IMAGE_PREFIX = "Image: "
NO_IMAGE = "Image: N/A\n"
MARKER = re.compile(re.escape(IMAGE_MARKER) + r"\n?")
_FRONT_IMAGES = re.compile(f"(?:{MARKER.pattern})*")


class Piece(NamedTuple):
    """Consecutive tokens that are all predicted or all given.

    `opens_answer` marks the first piece of an answer; the last `num_closing` tokens of the piece end it; `fault` says
    why it cannot be asked for: the prompt by itself has other tokens than those in front of it.
    """

    ids: list[int]
    predicted: bool = False
    opens_answer: bool = False
    num_closing: int = 0
    fault: str = ""


def name_missing_image(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns of a sample without image, which says so in front of its first user turn."""
    if any(IMAGE_MARKER in turn.text for turn in turns):
        return turns
    first = 1 if turns[0].role == SYSTEM else 0
    return (*turns[:first], Turn(role="user", text=NO_IMAGE + turns[first].text), *turns[first + 1 :])


def system_in_question(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """For templates that know no system turn: its text is a line before the first question, behind the images in front
    of that."""
    if turns[0].role != SYSTEM:
        return turns
    system, question, *others = turns
    front, asked = split_front_images(question.text)
    return (Turn(role="user", text=f"{front}{system.text}{chr(10) if asked else ''}{asked}"), *others)


def split_front_images(text: str) -> tuple[str, str]:
    """(the places of images in front of a turn's text, "" where there are none; the text behind them)."""
    front = _FRONT_IMAGES.match(text)
    assert front is not None, "it matches nothing, too"
    return front[0], text[front.end() :]
