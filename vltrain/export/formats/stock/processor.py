"""A stock model's processor beside its weights, as the run reads samples with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vltrain.data.stock.processor import StockProcessor, stock_processor
from vltrain.data.stock.source import StockSource, find
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.export.format import Source
from vltrain.files.strict_json import read_object

IMAGES, WHOLE = "preprocessor_config.json", "processor_config.json"
# All that transformers reads of a processor; what it needs for videos and sound goes along as it is.
FILES = (
    WHOLE, IMAGES, "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt",
)  # fmt: skip
PROBES = ((64, 64), (90, 200), (333, 120))  # (height, width) of pictures


def write_processor(folder: Path, source: Source) -> Tokenizer:
    """Copies the processor's files, with `processor_options` in them, and reads them again.

    Returns: the run's tokenizer.

    Raises: InputError if what was written reads texts or pictures in another way than the run does.
    """
    places = source.config.model.processor
    assert places is not None, "a stock model has a processor"
    ours = StockSource.of(places)
    for name in FILES:
        if (path := find(stock_processor(ours).where, name)) is not None:
            shutil.copyfile(path, folder / name)
    if ours.given:
        _write_options(folder, ours.given)
    written = stock_processor(dataclasses.replace(ours, processor=str(folder), options="{}"))
    _require_same(stock_processor(ours), written, folder)
    stock_processor.cache_clear()  # the folder is to get another name
    return written.tokenizer


def _write_options(folder: Path, options: dict[str, Any]) -> None:
    """Puts settings of the image processor where its others are."""
    path = folder / IMAGES
    if path.is_file():
        told = {**read_object(path), **options}
    else:
        path = folder / WHOLE
        told = read_object(path)
        told["image_processor"] = {**told.get("image_processor", {}), **options}
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _require_same(ours: StockProcessor, written: StockProcessor, folder: Path) -> None:
    different = [] if ours.tokenizer.fingerprint == written.tokenizer.fingerprint else ["tokenizer"]
    if ours.tokenizer.chat_template != written.tokenizer.chat_template:
        different.append("chat template")
    draw = np.random.default_rng(0)
    for size in PROBES:
        picture = Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8))
        (made, text), (again, other) = (one.process([[picture]]) for one in (ours, written))
        same = made.keys() == again.keys() and all(_equal(made[name], again[name]) for name in made)
        different += [] if same and text == other else [f"pictures of {size[1]} x {size[0]} pixels"]
    if different:
        raise InputError(
            f"{folder}: the processor that was written there differs from the run's: {', '.join(different)}; report "
            "this, with the processor's files"
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(np.array_equal(one, other))
