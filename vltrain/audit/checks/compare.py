"""How far two ways to compute one thing are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEAST_SHARE = 0.1
"""Of the largest of several norms: below it a tensor counts as of that size, since rounding alone makes it."""


def apart(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; infinite where shapes differ or a number is NaN."""
    if found.shape != expected.shape:
        return float("inf")
    return _ratio(_norm(found - expected), _norm(expected))


def worst_row(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, int]:
    """The largest `apart` of pairs of tensors, and whose it is."""
    sizes = [apart(one, other) for one, other in zip(found, expected, strict=True)]
    worst = max(range(len(sizes)), key=lambda row: sizes[row])
    return sizes[worst], worst


def worst_named(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `apart` of tensors of one name, and the name: for gradients, of which some are next to nothing."""
    largest = max((_norm(one) for one in expected.values()), default=0.0)
    worst, where = 0.0, ""
    for name, one in expected.items():
        if name not in found:
            return float("inf"), name
        size = _ratio(_norm(found[name] - one), max(_norm(one), LEAST_SHARE * largest))
        if size > worst or not where:
            worst, where = size, name
    return worst, where


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def _ratio(difference: float, size: float) -> float:
    if difference != difference:
        return float("inf")
    return 0.0 if difference == 0 else difference / size if size else float("inf")
