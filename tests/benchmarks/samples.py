"""Samples and packs to measure with: real ones of easy-VQA, and ones of random tokens that are as long as ScienceQA's.

How long a step takes does not depend on which tokens it sees, so of ScienceQA, whose licence keeps it out of the
project, only the lengths are here: quantiles of the questions with lecture and explanation (QCM-ALE), as SmolLM2's
tokenizer counts them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from vltrain.data.packing import pack_lengths
from vltrain.data.shard_writer import write_shards
from vltrain.data.shards import PackedDataset
from vltrain.data.text.conversation import encode_sample
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, PackedRow, Segment

# Of 107 of its questions, in steps of a twentieth.
SCIENCEQA_QUANTILES = (
    54,
    85,
    149,
    172,
    185,
    195,
    209,
    211,
    213,
    221,
    230,
    248,
    261,
    275,
    304,
    342,
    409,
    447,
    482,
    523,
    847,
)
SCIENCEQA_LABEL_SHARE = 0.74  # the median question's: answer, lecture and explanation
SCIENCEQA_IMAGE_SHARE = 0.487  # of all 21,208 questions (Lu et al. 2022)
EASYVQA_LENGTHS = (22, 28)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Tokenised samples and the image files that they name."""

    segments: list[Segment]
    pictures: dict[str, bytes]


def scienceqa_lengths(count: int, seed: int = 0) -> np.ndarray:
    """int64 [count], drawn by the quantiles above."""
    places = np.random.default_rng(seed).random(count) * (len(SCIENCEQA_QUANTILES) - 1)
    return np.interp(places, np.arange(len(SCIENCEQA_QUANTILES)), SCIENCEQA_QUANTILES).round().astype(np.int64)


def scienceqa_like(
    count: int, *, vocabulary: int, visual_tokens: int, image_share: float = SCIENCEQA_IMAGE_SHARE, seed: int = 0
) -> Samples:
    """Samples of random tokens with ScienceQA's lengths; some have an image, each its own."""
    generator = np.random.default_rng(seed)
    segments, pictures = [], {}
    for number, length in enumerate(scienceqa_lengths(count, seed).tolist()):
        images: tuple[str, ...] = ()
        head = [TEXT_MODALITY_TOKEN]
        if generator.random() < image_share:
            images, head = (f"{number}.png",), [IMAGE_MODALITY_TOKEN, *[IMAGE_TOKEN] * visual_tokens]
            pictures[images[0]] = _png(generator)
        input_ids = np.array([*head, *generator.integers(3, vocabulary, length - len(head))], np.int32)
        loss_mask = np.arange(length) >= length - round(SCIENCEQA_LABEL_SHARE * (length - len(head)))
        segments.append(Segment(sample_id=str(number), input_ids=input_ids, loss_mask=loss_mask, images=images))
    return Samples(segments=segments, pictures=pictures)


def easyvqa(count: int, *, tokenizer: str, visual_tokens: int) -> Samples:
    """The first training questions of easy-VQA, which needs the package easy-vqa."""
    from data_prep.sources import SOURCES

    loaded = load_tokenizer(tokenizer)
    segments, pictures = [], {}
    for raw in islice((raw for raw in SOURCES["easyvqa"](None, {}) if raw.split == "train"), count):
        segments.append(encode_sample(raw.sample, loaded, "mmt", visual_tokens))
        for name, source in zip(raw.sample.images, raw.image_sources, strict=True):
            pictures[name] = source.read_bytes() if isinstance(source, Path) else source()
    return Samples(segments=segments, pictures=pictures)


def _png(generator: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def pack_samples(samples: Samples, pack_length: int, folder: Path, visual_tokens: int) -> PackedDataset:
    """Packs and writes them as `data_prep.pack` does."""
    lengths = np.array([len(segment.input_ids) for segment in samples.segments])
    order, starts = pack_lengths(lengths, pack_length)
    facts = {
        "tokenizer_fingerprint": "none",
        "tokenizer": "none",
        "template": "mmt",
        "visual_tokens": visual_tokens,
        "pack_length": pack_length,
        "max_images": None,
        "seed": 0,
        "over_long": 0,
    }
    with write_shards(folder) as writer:
        ids = {name: writer.add_image(data) for name, data in samples.pictures.items()}
        for row in _rows([samples.segments[place] for place in order.tolist()], starts.tolist(), ids):
            writer.add_row(row)
        writer.finish(**facts)
    return PackedDataset(folder, verify=False)


def _rows(segments: list[Segment], starts: list[int], ids: dict[str, int]) -> Iterator[PackedRow]:
    for first, last in zip(starts[:-1], starts[1:], strict=True):
        row = segments[first:last]
        shown = np.array([ids[name] for segment in row for name in segment.images], np.int64)
        distinct, slots = np.unique(shown, return_inverse=True)
        yield PackedRow(
            input_ids=np.concatenate([segment.input_ids for segment in row]),
            loss_mask=np.concatenate([segment.loss_mask for segment in row]),
            segment_lengths=np.array([len(segment.input_ids) for segment in row], np.int32),
            image_ids=distinct,
            image_slots=slots.astype(np.int32),
            sample_ids=tuple(segment.sample_id for segment in row),
        )
