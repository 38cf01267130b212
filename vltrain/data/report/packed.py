"""What the packs hold: lengths, fill, what the vocabulary cannot spell, and which tokens carry loss."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from vltrain.data.report.finding import FAILED, OK, WARNING, Finding, quoted, share, some, spread
from vltrain.data.shards import PackedDataset
from vltrain.data.text.spelling import describe_lost
from vltrain.data.text.tokenizer import Tokenizer

LABELS = "labels"  # what the line about them is called
MOST_PACKS = 200
"""Packs that are read token by token; of more, so many are drawn."""
LEAST_FILL = 0.5
MANY_BYTES = 0.1
"""Share of a text's tokens that may be parts of characters."""


class Part(NamedTuple):
    """A sample inside a pack. `tokens` int32 [L], `mask` bool [L]."""

    name: str
    tokens: np.ndarray
    mask: np.ndarray


def parts_of(packs: PackedDataset, most: int = MOST_PACKS) -> list[Part]:
    """The samples in some packs, drawn evenly."""
    return list(_parts(packs, np.linspace(0, len(packs) - 1, min(len(packs), most), dtype=np.int64).tolist()))


def _parts(packs: PackedDataset, numbers: list[int]) -> Iterator[Part]:
    for number in numbers:
        row, start = packs.row(number), 0
        for name, length in zip(row.sample_ids, row.segment_lengths.tolist(), strict=True):
            yield Part(name, row.input_ids[start : start + length], row.loss_mask[start : start + length])
            start += length


def lengths(packs: PackedDataset, parts: list[Part]) -> Finding:
    """Tokens of samples, and how full the packs are."""
    manifest = packs.manifest
    told = (
        f"{manifest.num_samples:,} samples in {len(packs):,} packs of at most {manifest.pack_length:,} tokens, "
        f"{share(manifest.fill, 1)} full; tokens of a sample: {spread([len(part.tokens) for part in parts])}"
    )
    if manifest.over_long:
        told += f"; {manifest.over_long:,} samples were too long and are left out"
    sparse = manifest.fill < LEAST_FILL and len(packs) > 1
    if sparse:
        told += "; data.pack_length leaves room that nothing fills: choose one that whole samples fill, or less images"
    return Finding(status=WARNING if sparse or manifest.over_long else OK, what="packs", found=told)


def unknown_tokens(packs: PackedDataset, parts: list[Part], tokenizer: Tokenizer) -> Finding:
    """What the vocabulary cannot spell, or spells in parts of characters."""
    lost = describe_lost(packs.manifest.lost, packs.manifest.num_samples)
    rare = _parts_of_characters(tokenizer)
    tokens = np.concatenate([part.tokens[part.tokens >= 0] for part in parts])
    in_bytes = int(np.isin(tokens, list(rare)).sum()) if rare else 0
    told = lost or ["none"]
    if in_bytes:
        told = [*told, f"{share(in_bytes, len(tokens))} of the tokens are parts of characters (bytes)"]
    many = in_bytes > MANY_BYTES * len(tokens)
    if many:
        told = [*told, "this vocabulary has no pieces for much of the text: take a model of its language"]
    return Finding(status=WARNING if lost or many else OK, what="unknown tokens", found="; ".join(told))


def _parts_of_characters(tokenizer: Tokenizer) -> Collection[int]:
    """Ids of the bytes by which a vocabulary spells a character that it has no piece for; none where it has an unknown
    token for that."""
    # Of planes for private use, which no vocabulary has a piece of; together they have each byte behind a first one.
    rare = "".join(chr(0xF0000 + 65 * number) for number in range(64))
    ids = set(tokenizer.encode(rare)) - set(tokenizer.encode(" ".join(string.printable)))
    return ids if len(ids) >= 64 else ()


def labels(
    parts: list[Part], answers: Mapping[str, tuple[str, ...]], tokenizer: Tokenizer, stop_ids: Collection[int]
) -> Finding:
    """Whether loss lies on the answers and on what ends them, and on nothing else.

    Args:
        answers: of the samples by id, as texts; of a sample that is missing here only the places of its labels are
            looked at.
        stop_ids: that end an answer.
    """
    wrong, compared = list[str](), 0

    @cache
    def reads(text: str) -> str:
        return _plain(tokenizer.decode(tokenizer.encode(text)))

    for name, tokens, mask in parts:
        said = tokens[mask]
        if not len(said) or (said < 0).any():
            where = "no label" if not len(said) else "labels on the places of images"
            wrong.append(f"{name}: {where}")
        elif stop_ids and not set(stop_ids) & set(_last_run(tokens, mask)):
            wrong.append(f"{name}: loss on {quoted(tokenizer.decode(said.tolist()))}, and on no token that ends it")
        elif name in answers:
            compared += 1
            found = _plain(tokenizer.decode([one for one in said.tolist() if one not in stop_ids]))
            expected = answers[name]
            if found not in (_plain("".join(expected)), "".join(map(reads, expected))):
                wrong.append(f"{name}: loss on {quoted(found)}, its answer is {quoted(' / '.join(expected))}")
    count, whole = sum(int(part.mask.sum()) for part in parts), sum(len(part.tokens) for part in parts)
    told = f"{len(parts):,} samples read, {share(count, whole)} of their tokens carry loss"
    if wrong:
        told += f"; of {len(wrong):,} what carries loss is not the answer: the model would learn to say something else"
        return Finding(status=FAILED, what=LABELS, found=told, examples=some(wrong))
    told += f", decoded they are the answers of {compared:,}" if compared else "; no samples to compare them with"
    return Finding(status=OK, what=LABELS, found=told)


def _last_run(tokens: np.ndarray, mask: np.ndarray) -> list[int]:
    """The labels of a sample's last answer."""
    places = np.flatnonzero(mask)
    begins = int(np.flatnonzero(np.diff(places, prepend=-2) > 1)[-1])
    return tokens[places[begins:]].tolist()


def _plain(text: str) -> str:
    return "".join(text.split())
