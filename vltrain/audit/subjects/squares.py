"""Random pictures for models that read squares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vltrain.data.pictures import Pictures, SquareReader


def loaded_by(size: int) -> Callable[[str], np.ndarray]:
    """By a picture's number: uint8 [3, size, size]."""
    return lambda name: np.random.default_rng(int(name)).integers(0, 256, (3, size, size), dtype=np.uint8)


def square_pictures(size: int) -> Pictures:
    """Those that segments name by numbers."""
    return Pictures(SquareReader(size=size), loaded_by(size))
