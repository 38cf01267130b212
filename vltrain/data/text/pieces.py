"""What a template makes of a sample's turns: consecutive tokens that are all predicted or all given."""

from __future__ import annotations

import itertools
import re
from array import array
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vltrain.errors import InputError
from vltrain.schema import IMAGE_MARKER, SYSTEM, Sample, Turn, escape_markers

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


def prompt_of(pieces: list[Piece]) -> list[Piece]:
    """Everything before the last answer."""
    return pieces[: max(number for number, piece in enumerate(pieces) if piece.opens_answer)]


def candidate_of(pieces: list[Piece], whole: bool) -> list[Piece]:
    """Everything up to the last answer, which alone is predicted; `whole`: with what ends it."""
    given = prompt_of(pieces)
    ids, num_closing = pieces[len(given)].ids, pieces[len(given)].num_closing
    asked = Piece(ids if whole else ids[: len(ids) - num_closing], predicted=True)
    return [*(piece._replace(predicted=False) for piece in given), asked]


def require_askable(pieces: list[Piece], where: str) -> None:
    """Raises InputError where an answer's prompt by itself would have other tokens."""
    fault = next((piece.fault for piece in pieces if piece.fault), None)
    if fault is not None:
        raise InputError(f"{where}: {fault}")


def ids_and_mask(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids int32 [L], loss_mask bool [L])."""
    ids = array("i", itertools.chain.from_iterable(piece.ids for piece in pieces))
    mask = bytearray().join((b"\1" if piece.predicted else b"\0") * len(piece.ids) for piece in pieces)
    return np.frombuffer(ids, np.int32), np.frombuffer(mask, bool)


def answered_by(sample: Sample, text: str) -> Sample:
    """The sample with `text` in the place of its last answer."""
    return replace(sample, turns=(*sample.turns[:-1], Turn(role="assistant", text=escape_markers(text))))


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
