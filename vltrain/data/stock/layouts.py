"""What stands in the place of an image of some size in a text, to the token, without its pixels.

Families count differently, so none is asked to count: the processor works on one blank picture of that size, once, and
what it puts into the text is kept. Ids do not depend on what a picture shows. What they do depend on beside its size is
how many images the sample has: one or several, in families that cut a single image into tiles. Kept on disk as well, by
processor and settings, so that each size costs one picture for all processes and runs of a machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from vltrain.data.stock.processor import StockProcessor
from vltrain.errors import InputError

SEVERAL = 2
"""The count that stands for every larger one."""
_PROBE_SIZE = (480, 1200)  # of tiles where a family has them


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an image becomes.

    text    in the place of what the chat template writes for it
    tokens  placeholders among its tokens
    facts   by the processor's names, whole numbers of it that positions follow from (a grid of patches)
    """

    text: str
    tokens: int
    facts: dict[str, list[int]]


class Layouts:
    """Those of one processor."""

    def __init__(self, processor: StockProcessor) -> None:
        self._processor = processor
        self._known: dict[tuple[int, int, int], Layout] = {}
        stated = json.dumps([processor.facts(), processor.tokenizer.fingerprint, transformers.__version__])
        self._file = _cache_file(hashlib.sha256(stated.encode()).hexdigest())
        self._read()

    @functools.cached_property
    def counts_matter(self) -> bool:
        """Whether an image that stands alone in its sample becomes something else than one of several.

        Raises: InputError for a family in which two and three images differ, too.
        """
        one, two, three = (self._made(_PROBE_SIZE, count) for count in (1, 2, 3))
        if two != three:
            raise InputError(
                f"{self._processor.where}: what its processor makes of an image depends on how many its sample has, "
                "beyond one or several, so images can't be shared between samples"
            )
        return one != two

    def count_of(self, num_images: int) -> int:
        """What of the number of a sample's images decides what they become."""
        return min(num_images, SEVERAL) if self.counts_matter else 1

    def of(self, size: tuple[int, int], num_images: int) -> Layout:
        """What an image of `size` (height, width) in a sample of so many becomes. Raises InputError where the processor
        refuses the size."""
        key = (*size, self.count_of(num_images))
        if key not in self._known:
            self._known[key] = self._made(size, key[2])
            self._keep(key, self._known[key])
        return self._known[key]

    def tokens_in(self, text: str) -> int:
        """Placeholders among the tokens of what stands in an image's place."""
        return _count(self._processor, text)

    def _made(self, size: tuple[int, int], count: int) -> Layout:
        blank = Image.new("RGB", (size[1], size[0]))
        try:
            made, texts = self._processor.process([[blank] * count])
        except InputError as error:
            raise InputError(f"an image of {size[1]} x {size[0]} pixels: {error}") from None
        tokens = self.tokens_in(texts[0])
        if tokens == 0:
            raise InputError(
                f"{self._processor.where}: its processor writes no token {self._processor.image_token_id}, where the "
                "model puts images; they do not belong together"
            )
        facts = {
            name: [int(number) for number in value[0]]
            for name, value in made.items()
            if isinstance(value, torch.Tensor)
            and value.ndim == 2
            and len(value) == count
            and not value.is_floating_point()
        }
        return Layout(text=texts[0], tokens=tokens, facts=facts)

    def _read(self) -> None:
        """Takes what is kept on disk; lines that are not whole (of a process that was killed) are left out."""
        try:
            lines = self._file.read_bytes().split(b"\n") if self._file is not None else []
        except OSError:
            return
        for line in lines:
            try:
                height, width, count, runs, tokens, facts = json.loads(line)
                text = "".join(piece * times for piece, times in runs)
            except (ValueError, TypeError):
                continue
            self._known[height, width, count] = Layout(text=text, tokens=tokens, facts=facts)

    def _keep(self, key: tuple[int, int, int], layout: Layout) -> None:
        if self._file is None:
            return
        line = json.dumps([*key, _runs(layout.text, self._processor.image_token), layout.tokens, layout.facts])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One write at the file's end, so that lines of several processes do not mix.
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.write(handle, line.encode() + b"\n")
            finally:
                os.close(handle)
        except OSError:
            self._file = None  # a read-only or full disk: each process makes its own


@functools.lru_cache(maxsize=1 << 12)
def _count(processor: StockProcessor, text: str) -> int:
    return processor.tokenizer.encode_markup(text).count(processor.image_token_id)


def _runs(text: str, token: str) -> list[tuple[str, int]]:
    """A text as (piece, times) with runs of `token` as one."""
    found: list[tuple[str, int]] = []
    for piece in re.split(f"((?:{re.escape(token)})+)", text):
        times = len(piece) // len(token)
        found += [(token, times)] if times and piece == token * times else [(piece, 1)] if piece else []
    return found


def _cache_file(name: str) -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "vltrain", "layouts", f"{name[:32]}.jsonl") if os.path.isabs(base) else None


@functools.lru_cache(maxsize=4)
def layouts_of(processor: StockProcessor) -> Layouts:
    """The processor's layouts, one object in a process."""
    return Layouts(processor)


def facts_of(layouts: list[Layout]) -> dict[str, Any]:
    """The facts of several images, one row each: int64 tensors [K, ...]."""
    return {name: torch.tensor([one.facts[name] for one in layouts]) for name in (layouts[0].facts if layouts else {})}
