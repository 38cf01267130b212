"""Forty photos as people have them, and 120 questions about them in LLaVA's JSON: JPEGs that lie on their side,
cut-outs, palettes, WebP, 24 megapixels."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (230, 210, 50)}
SHAPES = ("circle", "rectangle")
SKIES = ((235, 235, 235), (205, 215, 230), (225, 215, 200))
ORIENTATION = 0x0112  # EXIF's tag; 6: the camera was turned, the picture lies on its side


def picture(colour: str, shape: str, size: tuple[int, int], draw: random.Random) -> Image.Image:
    """One coloured shape, somewhere, on a sky of some noise."""
    width, height = size
    image = Image.new("RGB", size, draw.choice(SKIES))
    edge = min(size) * draw.uniform(0.45, 0.65)
    left, top = draw.uniform(0.05, 0.95) * (width - edge), draw.uniform(0.05, 0.95) * (height - edge)
    paint = ImageDraw.Draw(image)
    box = (left, top, left + edge, top + edge * (1 if shape == "circle" else 0.7))
    (paint.ellipse if shape == "circle" else paint.rectangle)(box, fill=COLOURS[colour])
    return image


def save(image: Image.Image, folder: Path, number: int) -> str:
    """Writes the picture in one of seven ways. Returns the file's name."""
    kind = number % 7
    name = f"IMG_{number:04d}"
    if kind == 0:  # a camera held upright: the sensor's rows are the scene's columns
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(folder / f"{name}.JPG", quality=90, exif=exif)
        return f"{name}.JPG"
    if kind == 1:  # a cut-out: what is transparent holds whatever the eraser left
        cut = image.convert("RGBA")
        ImageDraw.Draw(cut).rectangle((0, 0, cut.width // 20, cut.height // 20), fill=(0, 0, 0, 0))
        cut.save(folder / f"{name}.png")
        return f"{name}.png"
    if kind == 2:
        image.quantize(32).save(folder / f"{name}.png")
        return f"{name}.png"
    if kind == 3:
        image.save(folder / f"{name}.webp", quality=85)
        return f"{name}.webp"
    if kind == 4:
        image.convert("CMYK").save(folder / f"{name}.jpeg", quality=90)
        return f"{name}.jpeg"
    if kind == 5:
        image.quantize(16).save(folder / f"{name}.gif")
        return f"{name}.gif"
    image.save(folder / f"{name}.jpg", quality=85, progressive=True)
    return f"{name}.jpg"


def make_photos(folder: Path) -> Path:
    """Writes photos and `chats.json` into the new folder. Returns the JSON file."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    records = []
    for number in range(40):
        colour, shape = draw.choice(list(COLOURS)), draw.choice(SHAPES)
        size = (6000, 4000) if number == 13 else draw.choice([(640, 480), (480, 640), (1024, 768), (300, 300)])
        name = save(picture(colour, shape, size, draw), folder, number)
        asked = [
            ("What color is the shape?", colour),
            ("What shape is in the image?", shape),
            (
                f"Is there a {colour} shape in the image?" if number % 2 else "Is there a red circle in the image?",
                "yes" if number % 2 or (colour, shape) == ("red", "circle") else "no",
            ),
        ]
        for turn, (question, answer) in enumerate(asked):
            conversation = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{number}-{turn}", "image": name, "conversations": conversation})
    (folder / "chats.json").write_text(json.dumps(records, indent=1))
    return folder / "chats.json"
