"""What a pack's tokens read as, one by one: the pieces that a page or a terminal shows, by segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vltrain.data.shards import STOCK_FORMAT, Manifest
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, PackedRow

MODALITY = {TEXT_MODALITY_TOKEN: "[u_text]", IMAGE_MODALITY_TOKEN: "[u_image]"}
_HALF = "\ufffd"  # what a decoder shows for a character whose bytes are not complete


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token, or several that are shown as one: the visual tokens of an image, special tokens that repeat.

    text: what it adds to the text before it, "" where a later token ends the character that it begins; the name of a
    special token.
    first, count: its tokens, by their place in the pack.
    image: which of the pack's `image_ids`; None: it is no visual token.
    """

    text: str
    kind: Literal["text", "special", "image"]
    first: int
    count: int
    has_loss: bool
    image: int | None = None


def segments_of(row: PackedRow, manifest: Manifest, tokenizer: Tokenizer) -> list[list[Piece]]:
    """The pieces of each segment of a pack of `manifest`'s shards. `tokenizer`: the one that they name."""
    stock = manifest.format_version == STOCK_FORMAT
    marks = tokenizer.special_names()
    if not stock:
        marks = {**marks, **({} if tokenizer.bos_id is None else {tokenizer.bos_id: "[BOS]"})}
        marks = {**marks, tokenizer.eos_id: "[EOS]", **MODALITY}
    image_token = _image_token(row, marks) if stock else IMAGE_TOKEN
    counts = row.image_tokens.tolist() if stock else [manifest.visual_tokens] * len(row.image_ids)
    runs = iter([(slot, counts[slot]) for slot in row.image_slots.tolist()])
    starts = np.cumsum(row.segment_lengths) - row.segment_lengths
    return [
        _pieces(row, (start, start + length), tokenizer, marks, _Images(image_token, runs))
        for start, length in zip(starts.tolist(), row.segment_lengths.tolist(), strict=True)
    ]


def positions_of(row: PackedRow) -> np.ndarray:
    """The positions of a pack's tokens, int [R, T]; R is 1 but for models that count in several rows."""
    if len(row.position_ids):
        return row.position_ids
    lengths = row.segment_lengths.astype(np.int64)
    return (np.arange(len(row.input_ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths))[None]


def _image_token(row: PackedRow, marks: dict[int, str]) -> int | None:
    """The id of a stock model's visual tokens: the special token of which the pack has as many as its images take. None
    where no or several ones do."""
    expected = int(row.image_tokens[row.image_slots].sum()) if len(row.image_slots) else 0
    ids, counts = np.unique(row.input_ids, return_counts=True)
    found = [one for one, count in zip(ids.tolist(), counts.tolist(), strict=True) if count == expected]
    special = [one for one in found if one in marks]
    return special[0] if expected and len(special) == 1 else None


@dataclass
class _Images:
    """Visual tokens, taken one after another: each run of `runs` (which image, how many tokens) in turn."""

    token: int | None
    runs: Iterator[tuple[int, int]]
    image: int = -1
    left: int = 0

    def take(self, most: int) -> tuple[int, int]:
        """(which image, how many of the next `most` visual tokens are of it)."""
        if not self.left:
            self.image, self.left = next(self.runs)
        count = min(most, self.left)
        self.left -= count
        return self.image, count


def _pieces(
    row: PackedRow, place: tuple[int, int], tokenizer: Tokenizer, marks: dict[int, str], images: _Images
) -> list[Piece]:
    ids, losses = row.input_ids.tolist(), row.loss_mask.tolist()
    first, end = place
    pieces: list[Piece] = []
    while first < end:
        token, has_loss, last = ids[first], losses[first], first + 1
        if token == images.token:
            while last < end and ids[last] == token:
                last += 1
            image, count = images.take(last - first)
            name = marks.get(token, "image")
            pieces.append(Piece(text=name, kind="image", first=first, count=count, has_loss=False, image=image))
            first += count
        elif token in marks:
            while not has_loss and last < end and ids[last] == token and not losses[last]:
                last += 1
            count = last - first
            pieces.append(Piece(text=marks[token], kind="special", first=first, count=count, has_loss=has_loss))
            first = last
        else:
            while last < end and ids[last] not in marks and ids[last] != images.token:
                last += 1
            for number, text in enumerate(token_texts(ids[first:last], tokenizer), first):
                pieces.append(Piece(text=text, kind="text", first=number, count=1, has_loss=losses[number]))
            first = last
    return pieces


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text of those before it; together the text of all, as it is decoded at once.

    A token means something beside its neighbours alone: a word's first has the space before it, and the bytes of one
    character may lie in several, of which the last gets it. So each is decoded behind the few before it.
    """
    texts, known, shown = [], 0, 0  # what is decoded along, and what is shown already
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(list(ids[known:shown])), tokenizer.decode(list(ids[known:end]))
        if now.endswith(_HALF) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        known, shown = shown, end
    return texts
