"""LLaVA's conversation JSON, the field's common layout for own data.

    [{"id": ..., "image": "a.jpg" or ["a.jpg", ...], "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}]

Images are found beside the file, or in the folder that the option `images` names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import settle
from data_prep.sources.raw import RawSample, read_json
from vltrain.errors import InputError
from vltrain.ranges import Range
from vltrain.schema import Sample, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads one file.

    Args:
        input: the JSON file.
        options: `val_fraction`, the share of samples held out as `val` by a hash of their id (0.02); `images`, a folder.

    Raises:
        InputError: not such a file, an unknown speaker, a path that leads out of the image folder; markers and images that differ.
    """
    settled = settle("llava_json", options, {"val_fraction": 0.02, "images": None}, {"val_fraction": Range(0, 1)})
    if input is None:
        raise InputError("source 'llava_json' needs --input, the JSON file")
    records = read_json(input)
    if not isinstance(records, list):
        raise InputError(f"{input}: found a {type(records).__name__}, expected a list of conversations")
    folder = Path(settled["images"]) if settled["images"] else input.parent
    for number, record in enumerate(records):
        yield _sample(record, f"{input}: record {number}", folder, settled["val_fraction"])


def _sample(record: Any, where: str, folder: Path, val_fraction: float) -> RawSample:
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
    held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < val_fraction * 2**32
    return RawSample(split="val" if held_out else "train", sample=sample, image_sources=tuple(folder / image for image in images))
