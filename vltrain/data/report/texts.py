"""Which texts are the same but for a word or two: MinHash over shingles of words, found by banding.

A text's shingles are its runs of `SHINGLE` words. Of two texts, the share of equal numbers in their sketches estimates
the share of shingles that they have in common (Broder, 1997); texts that agree in a band of them are compared. Of texts
that share 0.9 of their shingles 99% meet so, of those that share 0.5 some 3%.

Trade-off: texts of fewer than `LEAST_WORDS` words are the same or are not, since a word more or less is most of them.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from vltrain.data.report.groups import Groups
from vltrain.schema import IMAGE_MARKER

SHINGLE, LEAST_WORDS = 3, 16
NEAR = 0.85
"""Share of equal numbers from which on two texts are nearly the same."""
_BANDS, _ROWS = 8, 8
_MOST_COMPARED = 16  # of those that agree in a band, how many a text is compared with
_NO_WORD = re.compile(r"[\W_]+")
_FACTORS, _SHIFTS = np.random.default_rng(0).integers(1, 2**31 - 1, (2, 1, _BANDS * _ROWS), np.uint64)
_PRIME = np.uint64(2**31 - 1)


def normalised(text: str) -> str:
    """The words of a text in lower case: what a reader would call the same."""
    return _NO_WORD.sub(" ", text.replace(IMAGE_MARKER, " ").lower()).strip()


def digest_of(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def sketch_of(text: str) -> np.ndarray | None:
    """uint32 [64] of a normalised text; None for a short one."""
    words = text.split()
    if len(words) < LEAST_WORDS:
        return None
    runs = {zlib.crc32(" ".join(words[place : place + SHINGLE]).encode()) for place in range(len(words) - SHINGLE + 1)}
    shingles = np.fromiter(runs, np.uint64, len(runs))[:, None] % _PRIME
    return ((shingles * _FACTORS + _SHIFTS) % _PRIME).min(axis=0).astype(np.uint32)


def near_texts(sketches: Mapping[int, np.ndarray]) -> dict[int, int]:
    """For each text (its digest) that one: of those that are nearly the same, the digest of the first."""
    digests = list(sketches)
    groups = Groups(len(digests))
    if digests:
        table = np.stack([sketches[one] for one in digests])
        for band in range(_BANDS):
            met: dict[bytes, list[int]] = defaultdict(list)
            rows = np.ascontiguousarray(table[:, band * _ROWS : (band + 1) * _ROWS])
            for number, row in enumerate(rows):
                others = met[row.tobytes()]
                if others:
                    equal = (table[others] == table[number]).mean(axis=1) >= NEAR
                    for other in np.flatnonzero(equal).tolist():
                        groups.join(others[other], number)
                if len(others) < _MOST_COMPARED:
                    others.append(number)
    return {digest: digests[groups.root(number)] for number, digest in enumerate(digests)}
