"""Readers of raw data sets. A new data set is a module with a function `read` and a line in the table.

    read(input: Path | None, options: Mapping[str, Any]) -> iterator of RawSample

`options` are checked by `data_prep.sources.options.resolve_options`. A reader yields samples as they come, opens no
image and writes nothing: `data_prep.prepare` does that for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import (
    clips,
    easyvqa,
    flickr30k,
    iconqa,
    llava_json,
    scienceqa,
    scienceqa_image,
    shapes,
    streamed,
    vizwiz,
)
from data_prep.sources.options import all_options
from data_prep.sources.raw import RawSample
from vltrain.errors import InputError
from vltrain.files.locate import locate

SOURCES: dict[str, Callable[[Path | None, Mapping[str, Any]], Iterator[RawSample]]] = {
    "clips": clips.read,
    "datasets": streamed.read,
    "easyvqa": easyvqa.read,
    "flickr30k": flickr30k.read,
    "iconqa": iconqa.read,
    "llava_json": llava_json.read,
    "scienceqa": scienceqa.read,
    "scienceqa_image": scienceqa_image.read,
    "shapes": shapes.read,
    "vizwiz": vizwiz.read,
}

# Where a source finds its data by itself, and the options that name a file or folder: what is read there counts, not
# what it is called.
OWN_DATA = {"easyvqa": "package://easy_vqa/data"}
_GIVEN = "a file or folder"
PATH_OPTIONS = {"datasets": ("images",), "llava_json": ("images",), "scienceqa": ("rationales",)}


def option_texts(source: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Every option of a source as a text, those at their default too; of one that names a file or folder only that it
    does."""
    paths = PATH_OPTIONS.get(source, ())
    resolved = all_options(SOURCES[source], options)
    return {name: _GIVEN if name in paths and value else str(value) for name, value in resolved.items()}


def places_of(source: str, input: Path | None, options: Mapping[str, Any]) -> dict[str, Path]:
    """The files and folders that a source is told to read, or finds by itself, by the name of the setting."""
    places = {"data.input": input} if input is not None else {}
    if input is None and source in OWN_DATA:
        with contextlib.suppress(InputError):  # not installed: whoever reads it says so
            places["data.input"] = Path(locate(OWN_DATA[source]))
    for name in PATH_OPTIONS.get(source, ()):
        if options.get(name):
            places[f"data.options.{name}"] = Path(str(options[name]))
    return places
