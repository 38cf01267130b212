"""What a reader of a raw data set yields, and how it reads JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.schema import Sample


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """A sample, its split, and the files that its images come from.

    `image_sources` has a path for each of `sample.images`; those are the names the images get in the prepared folder, below `images/`.
    """

    split: str
    sample: Sample
    image_sources: tuple[Path, ...] = ()


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError if it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
