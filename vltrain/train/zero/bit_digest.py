"""A 64-bit digest of a tensor's bits that parts of the tensor add up to.

Each number's bits, as an integer, are multiplied by a pseudo-random odd 64-bit number of its position; the digest is
the sum, modulo 2^64. So it is the same however a tensor is partitioned, one pass over memory on any device, and any
single number that changes changes it. Of several that change, a sum that stays the same is a matter of chance (2^-64
for most changes; 2^-32 at worst, where only top bits of fp32 differ). Trade-off: it withstands mistakes and faults of
memory, not an adversary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

COLUMNS = 1 << 12
# Numbers at once: what a CPU's cache holds as int64, or keeps a GPU busy with 64 MiB.
CHUNK_ROWS = {"cpu": 1 << 3, "cuda": 1 << 10}
_GOLDEN, _FIRST, _SECOND = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed numbers


def bit_digest(flat: Tensor, first: int = 0) -> Tensor:
    """The digest of a part of a tensor: an int64 scalar on the tensor's device, to be added to those of the other
    parts.

    Args:
        flat: [n] of any dtype of 1, 2, 4 or 8 bytes, contiguous.
        first: the place of its first number in the whole tensor, which is read row after row.
    """
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    if len(flat) == 0:  # which no other dtype can be seen in
        return total
    bits = flat.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    columns, rows_at_once = _columns(flat.device), CHUNK_ROWS.get(flat.device.type, 1 << 10)
    place = 0
    while place < len(bits):
        row, column = divmod(first + place, COLUMNS)
        num_rows = 0 if column else min(rows_at_once, (len(bits) - place) // COLUMNS)
        if num_rows:  # whole rows
            chunk = bits[place : place + num_rows * COLUMNS].view(num_rows, COLUMNS)
            factors = columns
        else:  # what is before the first one, or behind the last
            chunk = bits[place : place + COLUMNS - column].view(1, -1)
            factors = columns[column : column + chunk.shape[1]]
        sums = (chunk.to(torch.int64) * factors).sum(1)
        total += (sums * _odd(row, len(chunk), flat.device)).sum()
        place += chunk.numel()
    return total


@functools.cache
def _columns(device: torch.device) -> Tensor:
    return _odd(1 << 48, COLUMNS, device)  # numbers that no row has


def _odd(first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count], pseudo-random odd numbers of first, first + 1, ...: splitmix64's (Steele et al. 2014)."""
    state = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device) * _GOLDEN
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return (state ^ _shifted(state, 31)) | 1


def _shifted(state: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift of signed numbers repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
