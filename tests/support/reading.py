"""What a model in a test reads samples and images with."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vltrain.data.pictures import Pictures, SquareReader
from vltrain.data.text.encoder import TemplateEncoder


def squares(model: Any) -> SquareReader:
    return SquareReader(size=model.image_size)


def pictures(model: Any, load: Callable[[str], np.ndarray]) -> Pictures:
    return Pictures(squares(model), load)


def no_size(name: str) -> tuple[int, int]:
    """Of samples whose images' sizes nobody may ask for."""
    raise AssertionError(name)


def ranked(model: Any, tokenizer: Any, template: str, load: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Arguments of the classes in `CANDIDATES`."""
    encoder = TemplateEncoder(tokenizer, template, model.visual_tokens)
    return {
        "model": model, "encoder": encoder, "pictures": pictures(model, load), "size_of": no_size, "device": "cpu"
    }  # fmt: skip
