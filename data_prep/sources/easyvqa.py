"""easy-VQA: 5,000 generated 64 x 64 images of one coloured shape, 48,248 questions with one-word answers (MIT; Victor Zhou, 2019).

The data set is the installed `easy-vqa` package itself. Its test questions stay the test split; the questions of its last 200 training
images are held out as the split `val`, by image, so that no image of val is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import settle
from data_prep.sources.raw import RawSample, read_json
from vltrain.errors import InputError
from vltrain.locate import locate
from vltrain.schema import IMAGE_MARKER, Sample, Turn

VAL_IMAGES = 200
SHAPES = ("circle", "rectangle", "triangle")


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all three splits.

    Args:
        input: a folder with `train/` and `test/`, each with `questions.json` and `images/N.png`; None: the installed package's data.
        options: none.

    Raises:
        InputError: files missing or not as expected, named with the question's number.
    """
    settle("easyvqa", options, {})
    root = Path(locate("package://easy_vqa/data")) if input is None else input
    for part in ("train", "test"):
        path = root / part / "questions.json"
        records = read_json(path)
        images = [_image_number(record, path, number) for number, record in enumerate(records)]
        files = {image: root / part / "images" / f"{image}.png" for image in set(images)}
        first_held_out = max(images, default=0) + 1 - VAL_IMAGES if part == "train" else None
        for number, (question, answer, image) in enumerate(records):
            split = "val" if first_held_out is not None and image >= first_held_out else part
            yield RawSample(
                split=split,
                sample=Sample(
                    id=f"{part}/{number}",
                    images=(f"{part}/{image}.png",),
                    turns=(
                        Turn(role="user", text=f"{IMAGE_MARKER}\nQuestion: {question}\nAnswer:"),
                        Turn(role="assistant", text=answer),
                    ),
                    metadata={"question": question, "answer": answer, "kind": kind_of(question, answer)},
                ),
                image_sources=(files[image],),
            )


def kind_of(question: str, answer: str) -> str:
    """`color` or `shape`, with `yes/no` in front where the answer is one of the two."""
    if answer in ("yes", "no"):
        return "yes/no shape" if any(shape in question for shape in SHAPES) else "yes/no color"
    return "shape" if answer in SHAPES else "color"


def _image_number(record: Any, path: Path, number: int) -> int:
    match record:
        case [str(), str(), int(image)]:
            return image
    raise InputError(f"{path}: question {number} is {record!r}, expected [question, answer, image number]")
