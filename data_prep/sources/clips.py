"""Clips: short drawn films, as frames in order, with questions that no single frame answers.

A clip shows two or three plain figures on a pale ground, each of a name of its own. One of them moves, all others stay;
each appears in another frame and stays from then on. Questions are of order, of motion, and of looks alone, by skill:

    first      Which appears first? Options: (a) red star (b) blue circle.
    last       Which appears last? Options: (a) red star (b) blue circle.
    mover      Which moves? Options: (a) blue circle (b) red star.
    direction  Which way does the red star move? Options: (a) left (b) up (c) down (d) right.
    color      Which color is the star? Options: (a) red (b) black (c) blue (d) green.
    shape      Which shape is red? Options: (a) heart (b) circle (c) star (d) cross.

A sample's images are its frames, so that an InstructBLIP reads them as transformers' InstructBlipVideo does: its
Q-Former looks at each frame with the question, and the LLM gets all frames' tokens in order. Order and motion are in no
single frame but for what is there first; looks are. Everything follows from the seed. It says nothing about films of
the world.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pretrain.drawings import hue
from data_prep.sources.options import resolve_options
from data_prep.sources.raw import RawSample
from data_prep.sources.shapes import COLORS, MAX_CHOICES, SHAPES, Figure, Question, Scene, require_drawable, sample_of
from vltrain.config.ranges import MOST_SEED, MOST_STEPS, Range

SKILLS = ("first", "last", "mover", "direction", "color", "shape")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOST_FRAMES = 64
_SEEDS: int = 2**31  # of an outline
WAY = 0.4  # of the image's side, which the moving figure goes from its first frame to the last
DEFAULTS = {
    "train_clips": 2000,
    "val_clips": 250,
    "test_clips": 250,
    "frames": 4,
    "questions_per_clip": 2,
    "image_size": 64,
    "seed": 0,
    "skills": SKILLS[:4],
    "choices": "lettered",
    "prompt": "Question: {question} Options: {options}. Short answer:",
}
RANGES = {
    **dict.fromkeys(("train_clips", "val_clips", "test_clips"), Range(0, MOST_STEPS)),
    "frames": Range(3, MOST_FRAMES, hint=", since a clip without frames shows neither motion nor order"),
    "questions_per_clip": Range(1, MOST_STEPS),
    "image_size": Range(16, 4096),
    "seed": Range(0, MOST_SEED),
}


@dataclass(frozen=True)
class Clip:
    """`frames`: what each shows. `names` of the figures in the order in which they appear; `mover`: which one moves,
    `direction`: where to."""

    frames: tuple[Scene, ...]
    names: tuple[str, ...]
    mover: int
    direction: str


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Makes all splits.

    Args:
        input: must be None.
        options: `train_clips` (2000), `val_clips` and `test_clips` (250 each); `frames` (4); `questions_per_clip` (2),
            at most; `image_size` (64); `seed` (0); `skills`, a list (first, last, mover, direction; color and shape,
            too); `choices`, which answers are: `lettered` as `(a) red star`, or `plain` as `red star`; `prompt` with
            the places {question} and {options}, of which plain choices need no {options}.

    Raises:
        InputError: an option out of its range, or an input.
    """
    resolved = resolve_options("clips", options, DEFAULTS, RANGES)
    letters = require_drawable("clips", resolved, SKILLS, input, draws="frames")
    seen: set[Scene] = set()
    for number, split in enumerate(("train", "val", "test")):
        for index in range(resolved[f"{split}_clips"]):
            rng = np.random.default_rng([resolved["seed"], number, index])
            clip = make_clip(rng, resolved["image_size"], resolved["frames"])
            while not seen.isdisjoint(clip.frames):  # no frame of one clip is in another
                clip = make_clip(rng, resolved["image_size"], resolved["frames"])
            seen.update(clip.frames)
            offered = [question for question in ask(rng, clip) if question.skill in resolved["skills"]]
            chosen: list[int] = rng.permutation(len(offered))[: resolved["questions_per_clip"]].tolist()
            for place, which in enumerate(sorted(chosen)):
                shown = {f"{split}/{index}/{number}.png": frame for number, frame in enumerate(clip.frames)}
                asked, prompt = offered[which], resolved["prompt"]
                yield sample_of(f"{split}/{index}/{place}", split, shown, asked, prompt, letters=letters)


def make_clip(rng: np.random.Generator, image_size: int, num_frames: int) -> Clip:
    """Two or three figures that touch in no frame, the first there from the first frame on; the one that moves is seen
    in two frames at least, and the background changes nothing."""
    while True:
        count = int(rng.integers(2, 4)) if num_frames > 3 else 2
        shapes: list[int] = rng.permutation(len(SHAPES))[:count].tolist()
        colors: list[int] = rng.permutation(len(COLORS))[:count].tolist()
        begins = [0, *sorted((rng.permutation(num_frames - 2)[: count - 1] + 1).tolist())]
        mover = int(rng.integers(count))
        direction = str(rng.choice(list(DIRECTIONS)))
        figures: list[Figure] = []
        for shape, color in zip(shapes, colors):
            radius = float(rng.uniform(0.12, 0.17))
            red, green, blue = hue(rng, COLORS[color]).tolist()
            place: list[float] = rng.uniform(radius + 0.02, 0.98 - radius, 2).tolist()
            figures.append(
                Figure(shape, color, (red, green, blue), place[0], place[1], radius, int(rng.integers(_SEEDS)))
            )
        places = [_places(figures[mover], DIRECTIONS[direction], begins[mover], num_frames)]
        paths = [places[0] if number == mover else [figure] * num_frames for number, figure in enumerate(figures)]
        if all(_is_inside(figure) for figure in places[0]) and not _touch(paths, num_frames):
            break
    red, green, blue = rng.integers(225, 256, 3).tolist()
    frames = tuple(
        Scene(
            image_size, (red, green, blue), tuple(path[frame] for path, begin in zip(paths, begins) if begin <= frame)
        )
        for frame in range(num_frames)
    )
    return Clip(frames, tuple(figure.name for figure in figures), mover, direction)


def _places(figure: Figure, step: tuple[int, int], begin: int, num_frames: int) -> list[Figure]:
    """The moving figure in each frame; before it appears it is where it begins."""
    moved = [max(0, frame - begin) / (num_frames - 1 - begin) * WAY for frame in range(num_frames)]
    return [replace(figure, x=figure.x + step[0] * way, y=figure.y + step[1] * way) for way in moved]


def _is_inside(figure: Figure) -> bool:
    return all(figure.radius <= place <= 1 - figure.radius for place in (figure.x, figure.y))


def _touch(paths: Sequence[Sequence[Figure]], num_frames: int) -> bool:
    return any(
        np.hypot(one[frame].x - other[frame].x, one[frame].y - other[frame].y)
        < 1.15 * (one[frame].radius + other[frame].radius)
        for number, one in enumerate(paths)
        for other in paths[:number]
        for frame in range(num_frames)
    )


def ask(rng: np.random.Generator, clip: Clip) -> list[Question]:
    """All questions about a clip; of looks one of each, of some figure."""
    mover = clip.names[clip.mover]
    color, shape = clip.names[int(rng.integers(len(clip.names)))].split()
    return [
        _question(rng, "first", "Which appears first?", clip.names[0], clip.names),
        _question(rng, "last", "Which appears last?", clip.names[-1], clip.names),
        _question(rng, "mover", "Which moves?", mover, clip.names),
        _question(rng, "direction", f"Which way does the {mover} move?", clip.direction, list(DIRECTIONS)),
        _question(rng, "color", f"Which color is the {shape}?", color, _beside(rng, color, COLORS)),
        _question(rng, "shape", f"Which shape is {color}?", shape, _beside(rng, shape, SHAPES)),
    ]


def _beside(rng: np.random.Generator, right: str, names: Sequence[str]) -> list[str]:
    """The right one and as many others as are offered with it."""
    return [right, *rng.permutation([name for name in names if name != right])[: MAX_CHOICES - 1].tolist()]


def _question(rng: np.random.Generator, skill: str, text: str, right: str, choices: Sequence[str]) -> Question:
    """All choices, in random order."""
    shown = rng.permutation(list(choices)).tolist()
    return Question(skill, text, tuple(shown), shown.index(right))
