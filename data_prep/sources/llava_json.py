"""LLaVA's conversation JSON, the field's common layout for own data.

    [{"id": ..., "image": "a.jpg" or ["a.jpg", ...], "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}]

Images are found beside the file, or in the folder that the option `images` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import settle
from data_prep.sources.raw import RawSample, read_json
from data_prep.splits import FRACTIONS, drawn
from vltrain.errors import InputError
from vltrain.schema import Sample, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads one file.

    Args:
        input: the JSON file.
        options: `val_fraction` (0.02) and `test_fraction` (0), the shares of samples held out as `val` and `test`, by image (`data_prep.splits`):
            each in [0, 1), together less than 1; `images`, a folder.

    Raises:
        InputError: not such a file, an unknown speaker, a path that leads out of the image folder; markers and images that differ;
            fractions as `data_prep.splits.drawn`.
    """
    settled = settle("llava_json", options, {"val_fraction": 0.02, "test_fraction": 0.0, "images": None}, FRACTIONS)
    if input is None:
        raise InputError("source 'llava_json' needs --input, the JSON file")
    records = read_json(input)
    if not isinstance(records, list):
        raise InputError(f"{input}: found a {type(records).__name__}, expected a list of conversations")
    folder = Path(settled["images"]) if settled["images"] else input.parent
    yield from drawn(
        "llava_json", lambda: (_sample(record, f"{input}: record {number}", folder) for number, record in enumerate(records)), settled, options
    )


def _sample(record: Any, where: str, folder: Path) -> RawSample:
    try:
        name = str(record["id"])
        turns = tuple(Turn(role=ROLES[turn["from"]], text=str(turn["value"])) for turn in record["conversations"])
        listed = record.get("image") or []
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {type(error).__name__} {error}; expected id, conversations[from: human|gpt, value], image") from None
    images = tuple(listed) if isinstance(listed, list) else (listed,)
    if not all(isinstance(image, str) for image in images):
        raise InputError(f"{where}: image is {listed!r}, expected a file's name or a list of them")
    try:
        sample = Sample(id=name, turns=turns, images=images, metadata={"answer": turns[-1].text if turns else ""})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return RawSample(split="train", sample=sample, image_sources=tuple(folder / image for image in images))
