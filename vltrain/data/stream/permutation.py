"""A pseudo-random order that is computed where it is asked for, not stored."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every input bit changes every output bit. uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    state = np.array([seed & (2**64 - 1)], np.uint64)
    state = _mix(_mix(state + GOLDEN) + np.array([epoch], np.uint64) * GOLDEN)
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * GOLDEN)


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random permutation of range(n), evaluated at `positions` only.

    A Feistel network permutes the smallest range of 2^(2b) >= n numbers; a result outside range(n) goes through it
    again until it falls inside (cycle walking: Black and Rogaway, 2002), fewer than four times on average.

    Args:
        positions: int [m], each in [0, n).

    Returns:
        int64 [m], each in [0, n).
    """
    positions = np.asarray(positions, np.int64)
    assert n >= 1 and (len(positions) == 0 or 0 <= positions.min() <= positions.max() < n)
    half_bits = max(1, -(-(n - 1).bit_length() // 2))
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = _round_keys(seed, epoch)
    result = positions.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        left, right = result[walking] >> shift, result[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= n]
    return result.astype(np.int64)
