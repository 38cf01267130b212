"""Readers of raw data sets. A new data set is a module with a function `read` and a line in the table.

    read(input: Path | None, options: Mapping[str, Any]) -> iterator of RawSample

`options` are checked by `data_prep.sources.options.settle`. A reader yields samples as they come, opens no image and writes nothing:
`data_prep.prepare` does that for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import easyvqa, flickr30k, iconqa, llava_json, scienceqa, scienceqa_image, shapes, vizwiz
from data_prep.sources.raw import RawSample

SOURCES: dict[str, Callable[[Path | None, Mapping[str, Any]], Iterator[RawSample]]] = {
    "easyvqa": easyvqa.read,
    "flickr30k": flickr30k.read,
    "iconqa": iconqa.read,
    "llava_json": llava_json.read,
    "scienceqa": scienceqa.read,
    "scienceqa_image": scienceqa_image.read,
    "shapes": shapes.read,
    "vizwiz": vizwiz.read,
}
