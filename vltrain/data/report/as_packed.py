"""Whether packs hold what their samples say: some samples are tokenised again, and their tokens, labels and images
compared with those in the packs, one by one.

Found so: labels on the question, beside the answer by a token, or without the token that ends it; images in another
order, or those of a neighbour; packs of another version of the samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vltrain.data.images import sizes_below
from vltrain.data.report.finding import FAILED, OK, Finding, quoted, some
from vltrain.data.report.samples import lines_of
from vltrain.data.shards import PackedDataset
from vltrain.data.text.encoder import SampleEncoder, SizeOf
from vltrain.errors import InputError
from vltrain.files.strict_json import parse_line
from vltrain.schema import PackedRow, Sample, Segment

WHAT = "packs and samples"
MOST_PACKS = 32
"""Packs whose samples are compared, drawn evenly."""
_ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.)*")')


def as_packed(packs: PackedDataset, file: Path, encoder: SampleEncoder, max_pixels: int) -> Finding:
    """Args:
        file: of the samples that the packs were made from.

    Raises: InputError for a samples file that cannot be read.
    """
    numbers = np.unique(np.linspace(0, len(packs) - 1, min(len(packs), MOST_PACKS)).astype(np.int64)).tolist()
    wanted = {name for number in numbers for name in packs.sample_ids(number)}
    samples, size_of = _samples(file, wanted), sizes_below(file.parent, max_pixels)
    faults, compared = list[str](), 0
    for number in numbers:
        row = packs.row(number)
        if not all(name in samples for name in row.sample_ids):
            continue
        compared += len(row.sample_ids)
        encoded = [_encoded(encoder, samples[name], size_of) for name in row.sample_ids]
        faults += _of_row(packs, row, encoded, file.parent)
    if not compared:
        return Finding(status=OK, what=WHAT, found=f"not compared: {file} has other samples than the packs")
    if faults:
        told = f"{len(faults):,} of {compared:,} are in the packs otherwise than the samples say; pack them again"
        return Finding(status=FAILED, what=WHAT, found=told, examples=some(faults))
    told = f"tokens, labels and images of {compared:,} are what their samples give"
    return Finding(status=OK, what=WHAT, found=told)


def _samples(file: Path, wanted: Iterable[str]) -> Mapping[str, Sample]:
    """Those of these ids, by them."""
    left, found = set(wanted), dict[str, Sample]()
    for number, line in lines_of(file):
        named = _ID.search(line)
        if named is None or parse_line(named[1], str(file), number) not in left:
            continue
        sample = Sample.from_json(parse_line(line, str(file), number), f"{file}:{number}")
        found[sample.id] = sample
        left.discard(sample.id)
        if not left:
            break
    return found


def _encoded(encoder: SampleEncoder, sample: Sample, size_of: SizeOf) -> Segment | str:
    """A sample's tokens now, or why there are none."""
    try:
        return encoder.sample(sample, size_of)
    except InputError as error:
        return str(error)


def _of_row(packs: PackedDataset, row: PackedRow, encoded: list[Segment | str], folder: Path) -> list[str]:
    """What is wrong with the samples of a pack, in words."""
    slots, starts = iter(row.image_slots.tolist()), np.cumsum(row.segment_lengths) - row.segment_lengths
    faults = list[str]()
    for name, start, length, due in zip(row.sample_ids, starts, row.segment_lengths, encoded, strict=True):
        if isinstance(due, str):
            return [*faults, f"{name}: {due}"]
        place = slice(int(start), int(start + length))
        shown = [slot for _, slot in zip(due.images, slots)]
        fault = _apart(row.input_ids[place], row.loss_mask[place], due)
        fault = fault or _other_images(packs, row, shown, due, folder)
        faults += [f"{name}: {fault}"] if fault else []
    return faults


def _apart(ids: np.ndarray, mask: np.ndarray, due: Segment) -> str | None:
    if len(ids) != len(due.input_ids) or (ids != due.input_ids).any():
        same = min(len(ids), len(due.input_ids))
        place = int(np.append(ids[:same] != due.input_ids[:same], True).argmax())
        return f"{len(ids)} tokens, its sample gives {len(due.input_ids)}; they part at token {place + 1}"
    if (mask != due.loss_mask).any():
        place = int((mask != due.loss_mask).argmax())
        told = "carries loss and should not" if mask[place] else "carries no loss and should"
        counts = f"{int(mask.sum())} labels, its answer has {int(due.loss_mask.sum())}"
        return f"token {place + 1} of {len(ids)} {told} ({counts})"
    return None


def _other_images(packs: PackedDataset, row: PackedRow, slots: list[int], due: Segment, folder: Path) -> str | None:
    if len(slots) != len(due.images):
        return f"{len(slots)} images, its sample shows {len(due.images)}"
    for place, (slot, name) in enumerate(zip(slots, due.images, strict=True)):
        try:
            same = packs.image(int(row.image_ids[slot])) == (folder / name).read_bytes()
        except OSError as error:
            return f"its image {quoted(name)} cannot be read ({error.strerror})"
        if not same:
            return f"image {place + 1} of {len(slots)} is not {quoted(name)}"
    return None
