"""The audit's samples: a few segments of random tokens and images, from one notation for all architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vltrain.audit.small.sizes import VOCABULARY
from vltrain.schema import Segment

RESERVED = 64
"""Ids at the small vocabulary's end, where the special tokens are."""
FIRST_TEXT, LAST_TEXT = 3, VOCABULARY - RESERVED
Shape = tuple[int | str, ...]
"""Of a segment: runs of text tokens (numbers) and images (letters); half of the last run is the answer."""
MIXED: tuple[Shape, ...] = (
    (4, "a", 9), (2, "b", 3, "a", 6), (17,), (3, "c", 8), (1, "a", 7), (12,),
)  # fmt: skip
IN_FRONT: tuple[Shape, ...] = (("a", 9), ("b", "a", 8), (17,), ("c", 6), ("a", 7), (12,))
TEXT: tuple[Shape, ...] = ((13,), (5,), (21,), (1,), (9,), (13,))
"""Equal ones, one of one token, and some longer than any window of a small config."""


def random_ids(generator: np.random.Generator, count: int, last: int = LAST_TEXT) -> np.ndarray:
    """int32 [count] of text."""
    return generator.integers(FIRST_TEXT, last, count, dtype=np.int32)


def segment_of(
    shape: Shape,
    number: int,
    tokens: Sequence[int],
    image_token: int,
    *,
    front: Sequence[int] = (),
    text_is_answer: bool = True,
) -> Segment:
    """A segment of a shape.

    Args:
        number: of the segment, which names it and seeds its text.
        tokens: how many visual tokens each picture takes, "a" first.
        image_token: the id in their places.
        front: ids before all others.
        text_is_answer: of a segment without images all tokens but the first are predicted, instead of the last half.
    """
    generator = np.random.default_rng(number)
    images = tuple("abc".index(run) for run in shape if isinstance(run, str))
    runs = [np.asarray(front, np.int32)]
    for run in shape:
        is_image = isinstance(run, str)
        runs.append(
            np.full(tokens["abc".index(run)], image_token, np.int32) if is_image else random_ids(generator, run)
        )
    ids = np.concatenate(runs)
    begins = len(front) + 1 if text_is_answer and not images else len(ids) - len(runs[-1]) // 2
    return Segment(
        sample_id=str(number),
        input_ids=ids,
        loss_mask=np.arange(len(ids)) >= begins,
        images=tuple(map(str, images)),
        image_tokens=np.array([tokens[one] for one in images], np.int32),
    )


def question_of(segment: Segment) -> Segment | None:
    """A segment without what it answers; None of one that is too short to ask anything."""
    num_labels = int(segment.loss_mask.sum())
    end = max(len(segment.input_ids) - num_labels, 0 if segment.images else len(segment.input_ids) // 2)
    return cut(segment, end) if num_labels and end else None


def cut(segment: Segment, end: int) -> Segment:
    """The first `end` tokens, none of them to be predicted."""
    return replace(
        segment,
        input_ids=segment.input_ids[:end],
        loss_mask=np.zeros(end, bool),
        position_ids=segment.position_ids[:, :end],
        blocks=segment.blocks[:end],
    )


def answered(prompt: Segment, answer: np.ndarray) -> Segment:
    """A prompt and the answer behind it, int [A], all of which is to be predicted; without positions."""
    blocks = (
        np.concatenate([prompt.blocks, np.full(len(answer), -1, np.int32)]) if len(prompt.blocks) else prompt.blocks
    )
    ids = np.concatenate([prompt.input_ids, answer.astype(np.int32)])
    return replace(prompt, input_ids=ids, loss_mask=np.arange(len(ids)) >= len(prompt.input_ids), blocks=blocks)


def with_other_text(segment: Segment) -> Segment:
    """The segment with other ids of text."""
    ids = segment.input_ids
    is_text = (ids >= FIRST_TEXT) & (ids < LAST_TEXT)
    return replace(segment, input_ids=np.where(is_text, (ids + 1) % LAST_TEXT, ids))
