"""A `SampleEncoder` of a stock model: the very ids that its own processor gives, with positions and blocks."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vltrain.data.stock.chat import StockChat
from vltrain.data.stock.layouts import Layout, Layouts, layouts_of
from vltrain.data.stock.positions import blocks_of, positions_of
from vltrain.data.stock.processor import StockProcessor, stock_processor
from vltrain.data.stock.source import StockSource
from vltrain.data.text.conversation import PROCESSOR
from vltrain.data.text.encoder import SizeOf
from vltrain.data.text.pairs import Pair
from vltrain.data.text.pieces import Piece, answered_by, candidate_of, ids_and_mask, prompt_of, require_askable
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.schema import Sample, Segment, Turn

_COMPARED = 2
"""Samples of each number of images whose ids are compared with those of the whole processor, in each process."""
_PROBE = (Turn(role="user", text="red?"), Turn(role="assistant", text="yes"))


@dataclass(frozen=True)
class StockEncoder:
    """See `SampleEncoder`; placeholders follow from each image's size."""

    source: StockSource
    template: str = PROCESSOR
    visual_tokens: int = 0
    needs_image: bool = False
    padded: bool = False
    _compared: Counter[int] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def processor(self) -> StockProcessor:
        return stock_processor(self.source)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    @property
    def counts_matter(self) -> bool:
        return layouts_of(self.processor).counts_matter

    @property
    def multi_turn(self) -> bool:
        """Not where all in front of the answer sees each other: of earlier answers nothing could be learned."""
        return self.processor.family.blocks != "prefix"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        chat = chat_of(self.processor)
        ends = next(piece for piece in chat.pieces(chat.messages(_PROBE, ())) if piece.opens_answer)
        return tuple(dict.fromkeys((ends.ids[-1], self.tokenizer.eos_id, *self.tokenizer.end_ids)))

    @property
    def fingerprint(self) -> str:
        stated = [self.tokenizer.fingerprint, self.processor.facts(), self.processor.family.blocks]
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()

    def sample(self, sample: Sample, size_of: SizeOf, *, askable: bool = False) -> Segment:
        pieces, layouts = self._pieces(sample, size_of)
        if askable:
            require_askable(pieces, _where(sample))
        return self._segment(sample, pieces, layouts)

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair | None]:
        return [None] * len(texts)

    def prompt(self, sample: Sample, size_of: SizeOf) -> Segment:
        pieces, layouts = self._pieces(sample, size_of)
        require_askable(pieces, _where(sample))
        return self._segment(sample, prompt_of(pieces), layouts)

    def candidate(self, sample: Sample, text: str, whole: bool, size_of: SizeOf) -> Segment:
        pieces, layouts = self._pieces(answered_by(sample, text), size_of)
        require_askable(pieces, _where(sample))
        return self._segment(sample, candidate_of(pieces, whole), layouts)

    def _pieces(self, sample: Sample, size_of: SizeOf) -> tuple[list[Piece], list[Layout]]:
        known: Layouts = layouts_of(self.processor)
        try:
            if not self.multi_turn and sum(turn.role == "user" for turn in sample.turns) > 1:
                raise InputError("found several questions: this model does not support conversations")
            sizes = [size_of(name) for name in sample.images]
            layouts = [known.of(size, len(sizes)) for size in sizes]
            chat = chat_of(self.processor)
            messages = chat.messages(sample.turns, [one.text for one in layouts])
            pieces = list(chat.pieces(messages))
            if self._compared[len(sizes)] < _COMPARED:
                self._compared[len(sizes)] += 1
                self._require_processors_ids(sample, sizes)
        except InputError as error:
            raise InputError(f"{_where(sample)}: {error}") from None
        return pieces, layouts

    def _require_processors_ids(self, sample: Sample, sizes: list[tuple[int, int]]) -> None:
        """The whole processor, with blank pictures of those sizes, gives the prompt's ids. Raises InputError."""
        processor, chat = self.processor, chat_of(self.processor)
        if processor.writes_itself:  # what its template says is the whole input already
            return
        in_text = [processor.image_token] * len(sizes)
        text = chat.text(chat.messages(sample.turns[:-1], in_text))
        if chat.spells(sample.turns):
            return
        pictures = [Image.new("RGB", (width, height)) for height, width in sizes]
        settings = {"add_special_tokens": False} if chat.begins_itself(text) else {}
        own = processor.call(text, pictures, **settings)
        layouts = [layouts_of(processor).of(size, len(sizes)) for size in sizes]
        ids = chat.ids(chat.messages(sample.turns[:-1], [one.text for one in layouts]), True)
        if own != ids:
            raise InputError(
                f"the processor of {processor.where} gives a prompt of {len(own)} tokens, other than the {len(ids)} "
                "that its image processor, its chat template and its tokenizer give one by one; it can't be packed by"
            )

    def _segment(self, sample: Sample, pieces: list[Piece], layouts: list[Layout]) -> Segment:
        ids, mask = ids_and_mask(pieces)
        tokens = np.array([one.tokens for one in layouts], np.int32)
        found = int((ids == self.processor.image_token_id).sum())
        if found != tokens.sum():
            raise InputError(
                f"{_where(sample)}: {found} placeholders among its tokens, its {len(tokens)} image(s) take "
                f"{tokens.sum()}"
            )
        return Segment(
            sample_id=sample.id,
            input_ids=ids,
            loss_mask=mask,
            images=sample.images,
            position_ids=positions_of(self.processor).of(ids, layouts),
            blocks=blocks_of(ids, mask, self.processor),
            image_tokens=tokens,
        )


def _where(sample: Sample) -> str:
    return f"sample '{sample.id}'"


@functools.lru_cache(maxsize=4)
def chat_of(processor: StockProcessor) -> StockChat:
    """One object in a process."""
    return StockChat(processor)
