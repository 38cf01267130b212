"""Shapes: a visual-reasoning set that draws itself, in the style of IconQA's questions with text choices.

Each image shows one to six plain figures on a pale ground; questions are of counting, colour, shape and position:

    How many stars are there? Options: (a) 2 (b) 1 (c) 4.
    Which shape is green? Options: (a) heart (b) circle.
    Which color is the star? Options: (a) red (b) blue (c) black.
    Where is the red star? It is (_) the blue circle. Options: (a) above (b) left of.

Everything follows from the seed. No scene comes twice, so no image of one split is in another. It is small enough to
train a Q-Former from scratch on, which tells full tuning, LoRA and AdaLoRA apart where no data set can be downloaded;
it says nothing about photographs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_prep.pretrain.drawings import hue, outline
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.prompts import check_template, lettered
from data_prep.sources.raw import RawSample
from vltrain.config.ranges import MOST_SEED, MOST_STEPS, Range
from vltrain.errors import InputError
from vltrain.schema import IMAGE_MARKER, Sample, Turn

SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "heart")
COLORS = ("red", "green", "blue", "yellow", "black", "purple")
PLURALS = {"cross": "crosses"}
RELATIONS = ("left of", "right of", "above", "below")
SKILLS = ("counting", "color", "shape", "position")
MAX_FIGURES = 6
MAX_CHOICES = 4
_SEEDS: int = 2**31  # of an outline
SOFTNESS = 2  # figures are drawn this much larger and averaged, so that edges are smooth
DEFAULTS = {
    "train_images": 2000,
    "val_images": 250,
    "test_images": 250,
    "questions_per_image": 4,
    "image_size": 64,
    "seed": 0,
    "skills": SKILLS,
    "choices": "lettered",
    "prompt": "Question: {question} Options: {options}. Short answer:",
}
RANGES = {
    **dict.fromkeys(("train_images", "val_images", "test_images"), Range(0, MOST_STEPS)),
    "questions_per_image": Range(1, MOST_STEPS),
    "image_size": Range(16, 4096),
    "seed": Range(0, MOST_SEED),
}


@dataclass(frozen=True)
class Figure:
    """One figure: numbers of `SHAPES` and `COLORS`, its very colour, centre and radius in image sides, and the seed of
    its outline."""

    shape: int
    color: int
    ink: tuple[int, int, int]
    x: float
    y: float
    radius: float
    seed: int

    @property
    def name(self) -> str:
        return f"{COLORS[self.color]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """What an image shows. Called, it gives the PNG file's bytes."""

    image_size: int
    ground: tuple[int, int, int]
    figures: tuple[Figure, ...]

    def __call__(self) -> bytes:
        side = self.image_size * SOFTNESS
        image = Image.new("RGB", (side, side), self.ground)
        pen = ImageDraw.Draw(image)
        for figure in self.figures:
            (points,) = outline(np.random.default_rng(figure.seed), SHAPES[figure.shape], figure.radius * side, 0.0)
            pen.polygon([(figure.x * side + x, figure.y * side + y) for x, y in points], fill=figure.ink)
        stream = io.BytesIO()
        image.reduce(SOFTNESS).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


@dataclass(frozen=True)
class Question:
    """A question about a scene. `answer`: the number of the right choice."""

    skill: str
    text: str
    choices: tuple[str, ...]
    answer: int


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Makes all splits.

    Args:
        input: must be None.
        options: `train_images` (2000), `val_images` and `test_images` (250 each); `questions_per_image` (4), at most,
            as many as a scene allows; `image_size` (64); `seed` (0); `skills`, a list (counting, color, shape,
            position); `choices`, which answers are: `lettered` as `(a) red`, or `plain` as `red`; `prompt` with the
            places {question} and {options}, of which plain choices need no {options}.

    Raises:
        InputError: an option out of its range, or an input.
    """
    resolved = resolve_options("shapes", options, DEFAULTS, RANGES)
    letters = require_drawable("shapes", resolved, SKILLS, input, draws="images")
    seen: set[Scene] = set()
    for number, split in enumerate(("train", "val", "test")):
        for index in range(resolved[f"{split}_images"]):
            rng = np.random.default_rng([resolved["seed"], number, index])
            scene, questions = make_scene(rng, resolved["image_size"]), []
            while scene in seen or not (
                questions := ask(rng, scene, resolved["skills"], resolved["questions_per_image"])
            ):
                scene = make_scene(rng, resolved["image_size"])
            seen.add(scene)
            for place, question in enumerate(questions):
                shown = {f"{split}/{index}.png": scene}
                yield sample_of(f"{split}/{index}/{place}", split, shown, question, resolved["prompt"], letters=letters)


def require_drawable(
    source: str, resolved: Mapping[str, Any], skills: Sequence[str], input: Path | None, *, draws: str
) -> bool:
    """Whether choices have letters. Raises InputError for a prompt without its places, a skill that is none, and for an
    input: it `draws` its own."""
    letters = choose(source, "choices", resolved["choices"], ("lettered", "plain")) == "lettered"
    # a letter means nothing unless the prompt lists it; a plain answer can be asked for without its rivals
    unlisted = not letters and "{options}" not in resolved["prompt"]
    check_template(source, "prompt", resolved["prompt"], ("question",) if unlisted else ("question", "options"))
    for name in resolved["skills"]:
        if name not in skills:
            raise InputError(
                f"source '{source}', option 'skills': unknown '{name}', expected one of {', '.join(skills)}"
            )
    if input is not None:
        raise InputError(f"source '{source}' draws its {draws}, expected no --input, found {input}")
    return letters


def sample_of(
    name: str, split: str, shown: Mapping[str, Scene], question: Question, template: str, *, letters: bool = True
) -> RawSample:
    """A question about the images that are `shown`, by their names in order."""
    candidates = lettered(question.choices) if letters else list(question.choices)
    prompt = template.format(question=question.text, options=(" " if letters else ", ").join(candidates))
    sample = Sample(
        id=name,
        turns=(
            Turn(role="user", text=f"{IMAGE_MARKER * len(shown)}\n{prompt}"),
            Turn(role="assistant", text=candidates[question.answer]),
        ),
        images=tuple(shown),
        metadata={
            "question_type": "choose_txt",
            "choices": list(question.choices),
            "answer": question.answer,
            "candidates": candidates,
            "skills": [question.skill],
        },  # fmt: skip
    )
    return RawSample(split=split, sample=sample, image_sources=tuple(shown.values()))


def make_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """One to six figures that do not touch; half of the scenes draw from one to three colours or shapes only, so that
    there is to count."""
    colors, shapes = (rng.permutation(6)[: 6 if rng.random() < 0.5 else rng.integers(1, 4)] for _ in range(2))
    figures: list[Figure] = []
    wanted = int(rng.integers(1, MAX_FIGURES + 1))
    for _ in range(60):
        if len(figures) == wanted:
            break
        radius = float(rng.uniform(0.09, 0.13))
        x, y = map(float, rng.uniform(radius + 0.02, 0.98 - radius, 2).tolist())
        if any(np.hypot(x - other.x, y - other.y) < 1.15 * (radius + other.radius) for other in figures):
            continue
        shape, color = int(rng.choice(shapes)), int(rng.choice(colors))
        red, green, blue = hue(rng, COLORS[color]).tolist()
        figures.append(Figure(shape, color, (red, green, blue), x, y, radius, int(rng.integers(_SEEDS))))
    red, green, blue = rng.integers(225, 256, 3).tolist()
    return Scene(image_size, (red, green, blue), tuple(figures))


def ask(rng: np.random.Generator, scene: Scene, skills: Sequence[str], most: int) -> list[Question]:
    """At most `most` different questions that the scene answers beyond doubt, skills by turns."""
    askers = {"counting": _ask_counting, "color": _ask_color, "shape": _ask_shape, "position": _ask_position}
    offered = {skill: askers[skill](rng, scene) for skill in skills}
    asked: list[Question] = []
    while len(asked) < most and any(offered.values()):
        for skill in rng.permutation(list(offered)).tolist():
            if offered[skill] and len(asked) < most:
                asked.append(offered[skill].pop(int(rng.integers(len(offered[skill])))))
    return asked


def _question(rng: np.random.Generator, skill: str, text: str, right: str, others: Sequence[str]) -> Question:
    """With one to three wrong choices, in random order."""
    wrong = rng.permutation([other for other in others if other != right])[: int(rng.integers(1, MAX_CHOICES))].tolist()
    choices = rng.permutation([right, *wrong]).tolist()
    return Question(skill, text, tuple(choices), choices.index(right))


def _ask_counting(rng: np.random.Generator, scene: Scene) -> list[Question]:
    counted = {"shapes": len(scene.figures)}
    for figure in scene.figures:
        for name in (PLURALS.get(SHAPES[figure.shape], SHAPES[figure.shape] + "s"), f"{COLORS[figure.color]} shapes"):
            counted[name] = counted.get(name, 0) + 1
    # Most kinds of figures are there once: without this thinning, "1" would be a good guess without a look at the
    # image.
    counted = {name: count for name, count in counted.items() if count > 1 or rng.random() < 0.15}
    numbers = [str(number) for number in range(1, MAX_FIGURES + 1)]
    return [
        _question(rng, "counting", f"How many {name} are there?", str(count), numbers)
        for name, count in counted.items()
    ]


def _ask_color(rng: np.random.Generator, scene: Scene) -> list[Question]:
    single = [figure for figure in scene.figures if sum(figure.shape == other.shape for other in scene.figures) == 1]
    return [
        _question(rng, "color", f"Which color is the {SHAPES[figure.shape]}?", COLORS[figure.color], COLORS)
        for figure in single
    ]


def _ask_shape(rng: np.random.Generator, scene: Scene) -> list[Question]:
    single = [figure for figure in scene.figures if sum(figure.color == other.color for other in scene.figures) == 1]
    return [
        _question(rng, "shape", f"Which shape is {COLORS[figure.color]}?", SHAPES[figure.shape], SHAPES)
        for figure in single
    ]


def _ask_position(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Of pairs that have names of their own and lie clearly beside or above each other."""
    names = [figure.name for figure in scene.figures]
    questions: list[Question] = []
    for figure in scene.figures:
        for other in scene.figures:
            across, down = other.x - figure.x, other.y - figure.y
            clear = max(abs(across), abs(down)) > 0.2 and not 1 / 3 < abs(across) / max(abs(down), 1e-9) < 3
            if not clear or names.count(figure.name) > 1 or names.count(other.name) > 1:
                continue
            right = RELATIONS[int(across < 0)] if abs(across) > abs(down) else RELATIONS[2 + int(down < 0)]
            text = f"Where is the {figure.name}? It is (_) the {other.name}."
            questions.append(_question(rng, "position", text, right, RELATIONS))
    return questions
