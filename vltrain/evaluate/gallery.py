"""Answered questions as pictures for a run's loggers: the images, enlarged, above the question, the prediction and the
answer.

Pillow's built-in font draws them, so nothing is installed for it; letters that it lacks (most beyond ASCII) become
boxes here, while `predictions.jsonl` has every text as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vltrain.evaluate.scorers.scoring import Answer
from vltrain.schema import IMAGE_MARKER

WIDTH = 384
IMAGE_HEIGHT = 256
MARGIN = 12
FONT_SIZE = 15
MAX_LINES = 12  # of one text
INK, RIGHT, WRONG, PAPER = "#202124", "#188038", "#c5221f", "#ffffff"


def draw_card(answer: Answer, images: Sequence[Image.Image]) -> Image.Image:
    """An RGB picture of `WIDTH` pixels: `images` side by side, and the texts below."""
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "of a given size Pillow's is one"
    texts = [
        (answer.prompt.replace(IMAGE_MARKER, "").strip(), INK),
        (f"predicted: {answer.prediction.strip() or '(nothing)'}", RIGHT if answer.correct >= 0.5 else WRONG),
        (f"answer: {answer.answer}", INK),
    ]
    lines = [(line, colour) for text, colour in texts for line in wrap(text, font, WIDTH - 2 * MARGIN)]
    line_height = sum(font.getmetrics()) + 3
    top = IMAGE_HEIGHT if images else 0
    card = Image.new("RGB", (WIDTH, top + 2 * MARGIN + line_height * len(lines)), PAPER)
    room = (WIDTH - MARGIN * (len(images) + 1)) // max(len(images), 1)
    for place, image in enumerate(images):
        shown = _fit(image, max(room, 1), IMAGE_HEIGHT - MARGIN)
        left = MARGIN + place * (room + MARGIN) + (room - shown.width) // 2
        card.paste(shown, (left, MARGIN + (IMAGE_HEIGHT - MARGIN - shown.height) // 2))
    pen = ImageDraw.Draw(card)
    for number, (line, colour) in enumerate(lines):
        pen.text((MARGIN, top + MARGIN + number * line_height), line, fill=colour, font=font)
    return card


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to fit; small images are enlarged without blur, so that what the model sees can be seen."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, at spaces where possible; `MAX_LINES` of them at most."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width:
                fitting = next(
                    length
                    for length in range(len(line) - 1, 0, -1)
                    if length == 1 or font.getlength(line[:length]) <= width
                )
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."]
