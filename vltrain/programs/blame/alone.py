"""Single samples out of packs: what a packed sample computes is what it computes alone (`vltrain audit` shows it), so
each one's losses and gradient are those of a row that holds nothing else."""

from __future__ import annotations

import numpy as np

from vltrain.batch import Batch
from vltrain.data.kept.store import KeptImages
from vltrain.data.loader import assemble, collate
from vltrain.data.pictures import ImageReader
from vltrain.data.shards import PackedDataset
from vltrain.programs.blame.ranking import Place
from vltrain.schema import PackedRow


def image_runs(row: PackedRow, image_token: int, visual_tokens: int) -> list[list[int]]:
    """The image runs in each segment of a row, by their number.

    Args:
        image_token: the id of visual tokens.
        visual_tokens: of each image, where the row does not say.
    """
    counts = row.image_tokens[row.image_slots] if len(row.image_tokens) else None
    runs, run, start = [], 0, 0
    for length in row.segment_lengths.tolist():
        left = int((row.input_ids[start : start + length] == image_token).sum())
        own = []
        while left > 0:
            left -= visual_tokens if counts is None else int(counts[run])
            own.append(run)
            run += 1
        assert left == 0, "a segment ends inside an image"
        runs.append(own)
        start += length
    assert run == len(row.image_slots), (run, len(row.image_slots))
    return runs


def segment_of(row: PackedRow, segment: int, runs: list[int]) -> PackedRow:
    """A row with one segment of another alone. `runs`: its image runs, of `image_runs`."""
    lengths = row.segment_lengths.astype(np.int64)
    start = int(lengths[:segment].sum())
    inside = slice(start, start + int(lengths[segment]))
    slots = row.image_slots[runs]
    shown = np.unique(slots)
    asked = row.instruction_lengths.astype(np.int64)
    first = int(asked[:segment].sum())
    return PackedRow(
        input_ids=row.input_ids[inside],
        loss_mask=row.loss_mask[inside],
        segment_lengths=row.segment_lengths[segment : segment + 1],
        image_ids=row.image_ids[shown],
        image_slots=np.searchsorted(shown, slots).astype(np.int32),
        sample_ids=row.sample_ids[segment : segment + 1],
        instruction_ids=row.instruction_ids[first : first + int(asked[segment])] if len(asked) else row.instruction_ids,
        instruction_lengths=row.instruction_lengths[segment : segment + 1],
        position_ids=row.position_ids[:, inside] if row.position_ids.size else row.position_ids,
        blocks=row.blocks[inside] if len(row.blocks) else row.blocks,
        image_tokens=row.image_tokens[shown] if len(row.image_tokens) else row.image_tokens,
        image_counts=row.image_counts[shown] if len(row.image_counts) else row.image_counts,
    )


class SampleBatches:
    """Batches of one sample each, from packs.

    Args:
        image_token, visual_tokens: see `image_runs`.
        kept: features that are read in the images' place; None: images are decoded.
    """

    def __init__(
        self, dataset: PackedDataset, reader: ImageReader, image_token: int, visual_tokens: int, kept: KeptImages | None
    ) -> None:
        self._dataset, self._reader, self._kept = dataset, reader, kept
        self._image_token, self._visual_tokens = image_token, visual_tokens

    def of(self, place: Place) -> Batch:
        """The sample's. Raises InputError where an image cannot be read."""
        pack = self._dataset.row(place.pack)
        runs = image_runs(pack, self._image_token, self._visual_tokens)
        row = segment_of(pack, place.segment, runs[place.segment])
        where = f"{self._dataset.place}: pack {place.pack}, sample {row.sample_ids[0]}"
        if self._kept is not None:
            return assemble(row, self._kept.of_row(row, blank=False, where=where))
        pictures = [
            self._reader.decode(self._dataset.image(number), f"{where}, image {number}")
            for number in row.image_ids.tolist()
        ]
        return collate(row, pictures, self._reader)
