"""Prepared samples for evaluation: read, thinned out, sharded over ranks."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import TypeVar

from vltrain.errors import InputError
from vltrain.files.strict_json import read_lines
from vltrain.schema import Sample

T = TypeVar("T")


def read_samples(path: Path) -> list[Sample]:
    """The samples of a JSONL file. Raises InputError naming file and line for anything malformed, and for repeated
    ids."""
    samples = [
        Sample.from_json(record, where) for where, record in read_lines(path, "prepared samples (vltrain prepare)")
    ]
    if not samples:
        raise InputError(f"{path}: no samples in it, expected one JSON object per line")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InputError(f"{path}: the id '{sample.id}' occurs twice; answers could not be told apart")
        seen.add(sample.id)
    return samples


def thin_out(samples: list[T], max_samples: int | None) -> list[T]:
    """At most `max_samples`, evenly spaced over the file: the same ones each time, and not the first few images
    only."""
    if max_samples is None or len(samples) <= max_samples:
        return samples
    return [samples[number * len(samples) // max_samples] for number in range(max_samples)]


def draw_samples(samples: list[Sample], max_samples: int | None) -> list[Sample]:
    """At most `max_samples`, one of each of as many equal stretches of the file, by a hash of its id: the same ones
    each time, and whatever period the file has, such as ten questions about every image, not one place of it."""
    if max_samples is None or len(samples) <= max_samples:
        return samples
    ends = [number * len(samples) // max_samples for number in range(max_samples + 1)]
    return [min(samples[start:end], key=_drawn_by) for start, end in itertools.pairwise(ends)]


def _drawn_by(sample: Sample) -> bytes:
    return hashlib.sha256(b"evaluated " + sample.id.encode()).digest()


def shard_samples(samples: list[Sample], rank: int, world_size: int) -> list[int]:
    """Numbers of the samples that a rank answers: every `world_size`-th in the order of their texts' lengths."""
    by_length = sorted(
        range(len(samples)), key=lambda number: sum(len(turn.text) for turn in samples[number].turns[:-1])
    )
    return by_length[rank::world_size]
