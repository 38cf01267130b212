"""Drawings for the tiny vision transformer: one plain figure on a ground, and what it shows.

The domain is kept wide (nine figures, twelve colours with many hues each, any turn, pale, dark and graded grounds, hard
and soft edges), so that what a ViT learns here carries over to other plain drawings. Trade-off: no texture, no clutter,
one figure only. Nothing is read from any data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw

IMAGE_SIZE = 64
FIGURES = ("circle", "rectangle", "triangle", "ellipse", "star", "cross", "ring", "diamond", "heart")
# Everyday colour names, each with the CSS colours that a person would call so.
HUES = {
    "red": ("red", "crimson", "#e01010", "#d00000"),
    "green": ("lime", "green", "forestgreen", "limegreen", "#20c020"),
    "blue": ("blue", "mediumblue", "royalblue", "#2040e0"),
    "yellow": ("yellow", "gold", "#f0e020"),
    "black": ("black", "#101010", "#181818"),
    "gray": ("gray", "darkgray", "dimgray", "#909090"),
    "white": ("white", "snow", "#f4f4f4"),
    "brown": ("brown", "saddlebrown", "sienna", "#8b3a2a"),
    "teal": ("teal", "darkcyan", "#107878", "#0a8f8f"),
    "orange": ("orange", "darkorange", "#f08020"),
    "purple": ("purple", "darkviolet", "darkorchid", "indigo"),
    "pink": ("pink", "hotpink", "deeppink", "lightpink"),
}
COLOURS = tuple(HUES)
MIN_CONTRAST = 90.0  # Euclidean RGB distance between figure and ground
JITTER = 10  # how far a channel may stray from the named hue


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture and its truth.

    pixels  uint8 [3, 64, 64]
    figure  number of `FIGURES`
    colour  number of `COLOURS`
    place   centre x, centre y and radius, in image sides
    mask    bool [64, 64], true where the figure is
    """

    pixels: np.ndarray
    figure: int
    colour: int
    place: tuple[float, float, float]
    mask: np.ndarray


def draw(rng: np.random.Generator, variety: float = 1.0) -> Drawing:
    """One random drawing: a figure of `FIGURES` in a colour of `COLOURS`.

    `variety` in [0, 1]: how much its size and place vary and how often it is turned, uneven, soft, or on another than a
    plain pale ground. At 0 it is large and in the middle.
    """
    figure, colour = int(rng.integers(len(FIGURES))), int(rng.integers(len(COLOURS)))
    if rng.random() < 0.4:  # more of the three plainest: they differ least when small
        figure = int(rng.integers(3))
    ink = hue(rng, COLOURS[colour])
    ground = _ground(rng, ink, variety)
    smallest, largest = 12 - 7.5 * variety, 20 + 8 * variety
    radius = float(rng.uniform(smallest, largest if rng.random() < 0.3 else 18))
    spread = variety * (IMAGE_SIZE / 2 - radius)
    x, y = (float(IMAGE_SIZE / 2 + rng.uniform(-spread, spread)) for _ in range(2))
    soft = 2 if rng.random() < 0.4 * variety else 1
    image = Image.fromarray(ground.repeat(soft, axis=0).repeat(soft, axis=1))
    mask = Image.new("1", (IMAGE_SIZE, IMAGE_SIZE))
    points = outline(rng, FIGURES[figure], radius, variety)
    pen = ImageDraw.Draw(image)
    for number, part in enumerate(points):
        fill = tuple(ink) if number == 0 else tuple(int(v) for v in ground[int(y), int(x)])
        pen.polygon([((x + px) * soft, (y + py) * soft) for px, py in part], fill=fill)
        ImageDraw.Draw(mask).polygon([(x + px, y + py) for px, py in part], fill=int(number == 0))
    if soft > 1:
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    place = (x / IMAGE_SIZE, y / IMAGE_SIZE, radius / IMAGE_SIZE)
    return Drawing(pixels=pixels, figure=figure, colour=colour, place=place, mask=np.asarray(mask))


def hue(rng: np.random.Generator, name: str) -> np.ndarray:
    """int [3]: a colour that goes by `name`."""
    names = HUES[name]
    base = np.array(ImageColor.getrgb(names[int(rng.integers(len(names)))]))
    return np.clip(base + rng.integers(-JITTER, JITTER + 1, 3), 0, 255)


def _ground(rng: np.random.Generator, ink: np.ndarray, variety: float) -> np.ndarray:
    """uint8 [64, 64, 3]: mostly a pale plain ground, else any colour, at times graded; always in contrast to `ink`."""
    pale = rng.random() < 1 - 0.3 * variety and ink.min() < 120
    while True:
        corners = rng.integers(225 if pale else 0, 256, (2, 3))
        if rng.random() < 1 - 0.15 * variety:
            corners[1] = corners[0]
        if (np.square(corners - ink).sum(axis=1) >= MIN_CONTRAST**2).all():
            break
    ground = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    ramp = np.linspace(corners[0], corners[1], IMAGE_SIZE)  # pyright: ignore[reportUnknownVariableType] typed for numbers
    ground[:] = ramp if rng.random() < 0.5 else ramp[:, None]
    return ground


def outline(rng: np.random.Generator, figure: str, radius: float, variety: float) -> list[np.ndarray]:
    """Polygons around the origin, [P, 2] each; every one after the first is a hole."""
    ring = _regular(48, radius)
    if figure == "circle":
        return [ring]
    if figure == "ellipse":
        return [_turn(rng, ring * (1.0, float(rng.uniform(0.35, 0.7))), 3 * variety)]
    if figure == "ring":
        return [ring, ring * float(rng.uniform(0.4, 0.65))]
    if figure == "rectangle":
        return [_rectangle(rng, radius, variety)]
    if figure == "triangle":
        return [_triangle(rng, radius, variety)]
    if figure == "diamond":
        return [_regular(4, radius) * (float(rng.uniform(0.5, 0.85)), 1.0)]
    if figure == "star":
        spikes = _regular(10, radius)
        spikes[1::2] *= float(rng.uniform(0.35, 0.5))
        return [_turn(rng, spikes, variety)]
    if figure == "cross":
        arm = radius * float(rng.uniform(0.2, 0.35))
        half = [(-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm)]
        return [_turn(rng, np.array(half + [(-px, -py) for px, py in half]), variety)]
    assert figure == "heart", figure
    angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    wide = 16 * np.sin(angle) ** 3
    high = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return [np.stack([wide, -high], axis=1) * (radius / 16)]


def _rectangle(rng: np.random.Generator, radius: float, variety: float) -> np.ndarray:
    """[4, 2]: any aspect down to 1:3, sides up to about 1.8 radii."""
    long, short = radius * 0.9, radius * float(rng.uniform(0.35, 0.9))
    wide, high = (long, short) if rng.random() < 0.5 else (short, long)
    return _turn(rng, np.array([(-wide, -high), (wide, -high), (wide, high), (-wide, high)]), variety)


def _triangle(rng: np.random.Generator, radius: float, variety: float) -> np.ndarray:
    """[3, 2]: mostly one that stands upright on its base, else turned or uneven."""
    corners = _regular(3, radius)
    corners[0, 0] += radius * float(rng.uniform(-0.5, 0.5)) * (rng.random() < 0.3 * variety)
    corners *= (float(rng.uniform(0.7, 1.1)), float(rng.uniform(0.7, 1.1)))
    return _turn(rng, corners, variety)


def _regular(corners: int, radius: float) -> np.ndarray:
    """[corners, 2]: a regular polygon, first corner on top."""
    angle = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius


def _turn(rng: np.random.Generator, points: np.ndarray, variety: float) -> np.ndarray:
    """Turned by a random angle, at full variety one time in three."""
    if rng.random() >= variety / 3:
        return points
    angle = float(rng.uniform(0, 2 * math.pi))
    sine, cosine = math.sin(angle), math.cos(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]])
