"""easy-VQA: 5,000 generated 64 x 64 images of one coloured shape, 48,248 questions with one-word answers (MIT; Victor
Zhou, 2019).

The data set is the installed `easy-vqa` package itself. Its test questions stay the test split; the questions of its
last `val_images` training images are held out as the split `val`, by image, so that no image of val is trained on; one
that equals an earlier image is trained on as that one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import resolve_options
from data_prep.sources.raw import RawSample
from vltrain.config.ranges import MOST_STEPS, Range
from vltrain.data.report.same import same_images
from vltrain.errors import InputError
from vltrain.files.locate import locate
from vltrain.files.strict_json import expect, read_json, shown
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

DEFAULTS = {"val_images": 200}
SHAPES = ("circle", "rectangle", "triangle")


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all three splits.

    Args:
        input: a folder with `train/` and `test/`, each with `questions.json` and `images/N.png`; None: the installed
            package's data.
        options: `val_images` (200), 0 for none.

    Raises:
        InputError: files missing or not as expected, named with the question's number; `val_images` that leaves nothing
            to train on.
    """
    num_val = resolve_options("easyvqa", options, DEFAULTS, {"val_images": Range(0, MOST_STEPS)})["val_images"]
    root = Path(locate("package://easy_vqa/data")) if input is None else input
    for part in ("train", "test"):
        path = root / part / "questions.json"
        records = expect(read_json(path), list, str(path))
        images = [_image_number(record, path, number) for number, record in enumerate(records)]
        files = {image: root / part / "images" / f"{image}.png" for image in set(images)}
        held_out: set[int] = _held_out(files, num_val, path) if part == "train" else set()
        for number, (question, answer, image) in enumerate(records):
            split = "val" if image in held_out else part
            yield RawSample(
                split=split,
                sample=Sample(
                    id=f"{part}/{number}",
                    images=(f"{part}/{image}.png",),
                    turns=(
                        Turn(role="user", text=f"{IMAGE_MARKER}\nQuestion: {escape_markers(question)}\nAnswer:"),
                        Turn(role="assistant", text=escape_markers(answer)),
                    ),
                    metadata={"question": question, "answer": answer, "kind": kind_of(question, answer)},
                ),
                image_sources=(files[image],),
            )


def _held_out(files: dict[int, Path], num_val: int, path: Path) -> set[int]:
    """The numbers of the images of `val`."""
    first_held_out = max(files, default=0) + 1 - num_val
    numbers = sorted(files)
    alike = same_images([files[number] for number in numbers])
    held_out = {number for number, first in zip(numbers, alike, strict=True) if numbers[first] >= first_held_out}
    if files and len(held_out) == len(files):
        found = f"found {num_val}, but {path} asks about {len(files)} image(s)"
        raise InputError(
            f"source 'easyvqa', option 'val_images': {found}; expected 0 or more, and some left to train on"
        )
    return held_out


def kind_of(question: str, answer: str) -> str:
    """`color` or `shape`, with `yes/no` in front where the answer is one of the two."""
    if answer in ("yes", "no"):
        return "yes/no shape" if any(shape in question for shape in SHAPES) else "yes/no color"
    return "shape" if answer in SHAPES else "color"


def _image_number(record: Any, path: Path, number: int) -> int:
    match record:
        case [str(), str(), int(image)] if type(image) is int:
            return image
        case _:
            raise InputError(f"{path}: question {number} is {shown(record)}, expected [question, answer, image number]")
