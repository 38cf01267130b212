"""Samples -> tokens, in several processes; and a part's tokens on disk, for the merge.

    tokens.bin, mask.bin     int32 tokens and bool loss mask of all samples, one after another
    samples.jsonl            per chunk of samples their ids, images and lengths in tokens
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_prep.parallel import in_chunks, ordered_map
from data_prep.parts import Share
from vltrain.data.conversation import encode_sample
from vltrain.data.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.schema import Sample, Segment

_LINES_PER_CHUNK = 512


@dataclass(kw_only=True)
class Tokens:
    """Some tokenised samples, as arrays: cheap to send between processes."""

    ids: list[str] = field(default_factory=list)
    images: list[tuple[str, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    input_ids: bytes = b""  # int32
    loss_mask: bytes = b""  # bool


def tokenised(
    samples: Path, tokenizer: Tokenizer, template: str, visual_tokens: int, workers: int, share: Share | None = None
) -> Iterator[Tokens]:
    """Tokenises a file of samples, or a part's share of it: the lines that begin in its share of the bytes.

    Raises: InputError if the file cannot be read or a line is no sample.
    """
    try:
        num_bytes = samples.stat().st_size
        stream = samples.open("rb")
    except OSError as error:
        raise InputError(f"{samples}: cannot be read ({error.strerror})") from None
    first, last = (0, num_bytes) if share is None or share.part is None else share.bounds(share.part, num_bytes)
    shared = (str(samples), tokenizer, template, visual_tokens)
    with stream, tqdm(total=last - first, desc="samples", unit="B", unit_scale=True, disable=None) as progress:
        chunks = in_chunks(_lines(stream, first, last), _LINES_PER_CHUNK)
        # A small file is done before a second process has started.
        for tokens in ordered_map(_tokenise, chunks, workers if last - first > 1 << 20 else 1, shared):
            yield tokens
            progress.update(stream.tell() - first - progress.n)


def _lines(stream, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a binary file that begin in [first, last), with their numbers from 1."""
    number = 1
    if first > 0:
        position = 0
        while position < first - 1:
            block = stream.read(min(1 << 20, first - 1 - position))
            number += block.count(b"\n")
            position += len(block)
        # The rest of the line that holds the byte before: it began earlier, or ends just there.
        number += stream.readline().endswith(b"\n")
    while stream.tell() < last:
        line = stream.readline()
        if not line:
            return
        yield number, line
        number += 1


def _tokenise(lines: list[tuple[int, bytes]], file: str, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Tokens:
    segments: list[Segment] = []
    for number, line in lines:
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        sample = Sample.from_json(record, where)
        segments.append(encode_sample(sample, tokenizer, template, visual_tokens))
    return Tokens(
        ids=[segment.sample_id for segment in segments],
        images=[segment.images for segment in segments],
        lengths=[len(segment.input_ids) for segment in segments],
        input_ids=b"".join(segment.input_ids.tobytes() for segment in segments),
        loss_mask=b"".join(segment.loss_mask.tobytes() for segment in segments),
    )


def write_tokens(chunks: Iterable[Tokens], folder: Path) -> None:
    """Writes a part's tokens into `folder`."""
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "mask.bin").open("wb") as mask, (folder / "samples.jsonl").open("w") as samples:
        for chunk in chunks:
            tokens.write(chunk.input_ids)
            mask.write(chunk.loss_mask)
            samples.write(json.dumps({"ids": chunk.ids, "images": chunk.images, "lengths": chunk.lengths}) + "\n")


def read_tokens(folder: Path) -> Iterator[Tokens]:
    """What `write_tokens` wrote, chunk by chunk."""
    with (folder / "tokens.bin").open("rb") as tokens, (folder / "mask.bin").open("rb") as mask, (folder / "samples.jsonl").open() as samples:
        for line in samples:
            told = json.loads(line)
            total = sum(told["lengths"])
            yield Tokens(
                ids=told["ids"], images=[tuple(one) for one in told["images"]], lengths=told["lengths"],
                input_ids=tokens.read(4 * total), loss_mask=mask.read(total),
            )  # fmt: skip
