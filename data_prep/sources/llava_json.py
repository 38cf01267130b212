"""LLaVA's conversation JSON, the field's common layout for own data, as its files are: a JSON list, or JSON Lines.

    {"id": ..., "image": "a.jpg" or ["a.jpg", ...], "conversations": [{"from": "human", "value": "<image>\\n..."},
    {"from": "gpt", "value": ...}]} {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content":
    [{"type": "image"}, {"type": "text", "text": "..."}]}, ...], "images": [...]}

Images are found beside the file, or in the folder that the option `images` names. What real files have is read so, and
told once with a count:

- An id that comes again, or is missing, is numbered (`ID#2`; `record-7`); a numeric one becomes a text.
- Turns of the assistant before the first question, and questions behind the last answer, are left out: nothing could be
  learned from them.
- `<image>` in an answer or a system turn is the text "<image>". In a question it is an image; the text is written
  `<\\image>`.
- Content parts are joined as they stand. Where a record has image parts, they alone are images, and `<image>` in a text
  is text.
- A system turn stays one (see `vltrain.data.text.conversation`). Keys that are not read are named.

A record of which nothing can be made stops the reading, or with `unusable=drop` is left out and told; so does one that
has images and nowhere `<image>`, or with `unmarked=front` its images stand in front of the first question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.chats.conversations import ConversationReader
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.raw import RawSample
from data_prep.sources.splits import FRACTIONS, drawn
from vltrain.errors import InputError
from vltrain.files.strict_json import read_records


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads one file.

    Args:
        input: the file.
        options: `val_fraction` (0.02) and `test_fraction` (0), the shares of samples held out as `val` and `test`, by
            image (see `data_prep.sources.splits`), each in [0, 1), together less than 1; `images`, a folder;
            `unusable`: `error`, or `drop` to leave out records that are no samples, the first ones named; `unmarked`:
            `error`, or `front`, see the module.

    Raises:
        InputError: not such a file, a text that is none, an unknown speaker, an empty turn, speakers who do not
            alternate, a path that leads out of the image folder; markers and images that differ: named with file, line
            and path in the record. Fractions as `data_prep.sources.splits.drawn`.
    """
    defaults = {"val_fraction": 0.02, "test_fraction": 0.0, "images": None, "unusable": "error", "unmarked": "error"}
    resolved = resolve_options("llava_json", options, defaults, FRACTIONS)
    choose("llava_json", "unusable", resolved["unusable"], ("error", "drop"))
    choose("llava_json", "unmarked", resolved["unmarked"], ("error", "front"))
    if input is None:
        raise InputError("source 'llava_json' needs --input, the JSON or JSONL file")
    told: set[str] = set()
    yield from drawn("llava_json", lambda: _samples(input, resolved, told), resolved, options)


def _samples(input: Path, resolved: Mapping[str, Any], told: set[str]) -> Iterator[RawSample]:
    """All samples of the file, in one split. `told`: lines that were printed already, by a reading before."""
    folder = Path(resolved["images"]) if resolved["images"] else input.parent
    reader = ConversationReader(input, told, resolved["unmarked"] == "front")
    for number, (where, record) in enumerate(
        read_records(input, "a JSON list of conversations, or JSON Lines of them")
    ):
        try:
            sample = reader.sample(record, number, f"{where}, record {number}")
        except InputError as error:
            if resolved["unusable"] == "error":
                raise InputError(f"{error} (--options unusable=drop leaves such records out)") from None
            reader.leave_out(error)
            continue
        yield RawSample(split="train", sample=sample, image_sources=tuple(folder / image for image in sample.images))
    reader.log_counts()
