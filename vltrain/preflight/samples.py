"""A small pack of the run's own samples, to be computed in several ways: packed, alone, and with one of them
changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from vltrain.batch import Batch
from vltrain.data.loader import StepLoader, batch_of
from vltrain.models.interface import VisionLanguageModel
from vltrain.schema import PackedRow, Segment

LOOKED_AT = 64  # packs, evenly spread
MOST = 3  # samples of the small pack: one has neighbours on both sides


@dataclass(kw_only=True)
class SmallPack:
    """pack: the one that its segments are of. Of a pack of one sample one segment."""

    pack: int
    segments: list[Segment]
    pictures: dict[str, np.ndarray]
    loader: StepLoader
    image_token: int

    @property
    def shows_images(self) -> bool:
        return any(segment.images for segment in self.segments)

    @property
    def num_labels(self) -> int:
        return sum(int(segment.loss_mask.sum()) for segment in self.segments)

    def batch(self, segments: Sequence[Segment]) -> Batch:
        """A row of them; where any of the pack shows an image, with a blank one at least."""
        return batch_of(segments, self.pictures, self.loader.reader, blank=self.shows_images)

    def changed(self, place: int) -> list[Segment]:
        """The segments, that at `place` with its words in another order: each is the one before it."""
        segment = self.segments[place]
        ids = segment.input_ids.copy()
        words = np.flatnonzero((ids >= 0) & (ids != self.image_token))
        ids[words] = np.roll(ids[words], 1)
        other = replace(segment, input_ids=ids, instruction_ids=np.roll(segment.instruction_ids, 1))
        return [*self.segments[:place], other, *self.segments[place + 1 :]]

    def name(self, place: int) -> str:
        """In words."""
        return f"segment {place + 1} of {len(self.segments)} ('{self.segments[place].sample_id}')"


def small_pack(loader: StepLoader, model: VisionLanguageModel) -> SmallPack:
    """The shortest samples of a pack, some with images and some without where there are both."""
    index = loader.dataset.index
    numbers = np.unique(np.linspace(0, len(index) - 1, min(len(index), LOOKED_AT)).astype(np.int64))
    several = np.minimum(index.num_samples[numbers], MOST)
    best = numbers[np.lexsort((index.num_tokens[numbers], -np.sign(index.num_images[numbers]), -several))[0]]
    segments = segments_of(loader.dataset.row(int(best)), model)
    chosen = _some(segments)
    ids = {name for segment in chosen for name in segment.images}
    where = f"{loader.dataset.place}: pack {best}: image"
    pictures = {name: loader.reader.decode(loader.dataset.image(int(name)), f"{where} {name}") for name in ids}
    return SmallPack(pack=int(best), segments=chosen, pictures=pictures, loader=loader, image_token=model.image_token)


def _some(segments: list[Segment]) -> list[Segment]:
    """In their order."""
    by_length = sorted(range(len(segments)), key=lambda place: len(segments[place].input_ids))
    kinds = [[place for place in by_length if bool(segments[place].images) == shows] for shows in (True, False)]
    first = [places[0] for places in kinds if places]
    rest = [place for place in by_length if place not in first]
    return [segments[place] for place in sorted([*first, *rest][:MOST])]


def segments_of(row: PackedRow, model: VisionLanguageModel) -> list[Segment]:
    """The samples of a pack, their images by number."""
    slots, lengths = iter(row.image_slots.tolist()), row.segment_lengths.tolist()
    instructions = row.instruction_lengths.tolist() or [0] * len(lengths)
    found, start, said = [], 0, 0
    for name, length, spoken in zip(row.sample_ids, lengths, instructions, strict=True):
        place = slice(start, start + length)
        ids = row.input_ids[place]
        shown, images, tokens = int((ids == model.image_token).sum()), [], []
        while shown > 0:
            slot = next(slots)
            tokens.append(int(row.image_tokens[slot]) if len(row.image_tokens) else model.visual_tokens)
            images.append(str(row.image_ids[slot]))
            shown -= tokens[-1]
        found.append(
            Segment(
                sample_id=name,
                input_ids=ids,
                loss_mask=row.loss_mask[place],
                images=tuple(images),
                instruction_ids=row.instruction_ids[said : said + spoken],
                position_ids=row.position_ids[:, place],
                blocks=row.blocks[place] if len(row.blocks) else row.blocks,
                image_tokens=np.array(tokens if len(row.image_tokens) else [], np.int32),
            )
        )
        start, said = start + length, said + spoken
    return found


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """A context in which no module drops anything, still in training mode: rates are attributes of modules."""
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (isinstance(module, nn.Dropout) and name == "p")
            if is_rate and isinstance(value, float) and value > 0:
                before.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
