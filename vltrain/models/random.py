"""Random weights that depend on nothing but the recipe's seed and the weight's own name.

Every rank, every ZeRO stage and every later call (a resumed run, an evaluation) draws the same numbers, whatever was
drawn before and whichever other parts the model has.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Within it torch's CPU generator gives the numbers that belong to (`seed`, `name`); afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        yield
