"""Faults planted in real packs: shards written anew, of the same samples and images, with something of their rows
changed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vltrain.data.shard_writer import write_shards
from vltrain.data.shards import PackedDataset
from vltrain.schema import PackedRow

Change = Callable[[PackedRow], PackedRow]
FACTS = (
    "tokenizer_fingerprint", "tokenizer", "template", "visual_tokens", "pack_length", "max_images", "seed", "over_long",
    "lost",
)  # fmt: skip


def alter(folder: Path, change: Change) -> None:
    """Writes the packs of a folder anew, with each row changed; what they were made from is told as before."""
    packs, beside = PackedDataset(folder), folder.with_name(f"{folder.name}-altered")
    with write_shards(beside, version=packs.manifest.format_version) as writer:
        for number in range(len(packs)):
            row = packs.row(number)
            ids = [writer.add_image(packs.image(one)) for one in row.image_ids.tolist()]
            writer.add_row(change(dataclasses.replace(row, image_ids=np.array(ids, np.int64))))
        for record in folder.glob("made_from*"):
            shutil.copy(record, writer.folder)
        writer.finish(**{name: getattr(packs.manifest, name) for name in FACTS})
    shutil.rmtree(folder)
    beside.rename(folder)


def _masks(row: PackedRow, change: Callable[[np.ndarray], np.ndarray]) -> PackedRow:
    """With the mask of each sample changed."""
    ends = np.cumsum(row.segment_lengths)[:-1]
    return dataclasses.replace(row, loss_mask=np.concatenate([change(one) for one in np.split(row.loss_mask, ends)]))


def labels_on_the_question(row: PackedRow) -> PackedRow:
    """Loss lies on what is asked, and not on what is answered."""
    asked = _masks(row, lambda mask: (np.arange(len(mask)) > 0) & ~mask)
    return dataclasses.replace(asked, loss_mask=asked.loss_mask & (row.input_ids >= 0))


def labels_a_token_early(row: PackedRow) -> PackedRow:
    return _masks(row, lambda mask: np.append(mask[1:], False))


def labels_a_token_late(row: PackedRow) -> PackedRow:
    return _masks(row, lambda mask: np.append(False, mask[:-1]))


def ends_without_loss(row: PackedRow) -> PackedRow:
    """The last token of a sample, which ends its answer, carries none."""
    return _masks(row, lambda mask: np.append(mask[:-1], False))


def images_in_another_order(row: PackedRow) -> PackedRow:
    return dataclasses.replace(row, image_slots=row.image_slots[::-1].copy())


def images_of_the_neighbour(row: PackedRow) -> PackedRow:
    return dataclasses.replace(row, image_slots=np.roll(row.image_slots, 1))


CHANGES: dict[str, Change] = {
    one.__name__: one
    for one in (
        labels_on_the_question, labels_a_token_early, labels_a_token_late, ends_without_loss, images_in_another_order,
        images_of_the_neighbour,
    )
}  # fmt: skip
