"""What a recipe's model reads samples and images with: by a template and as squares, or by a stock model's own
processor."""

from __future__ import annotations

from typing import Protocol

from vltrain.config.schema import Config
from vltrain.data.pictures import ImageReader, SquareReader
from vltrain.data.text.encoder import SampleEncoder, TemplateEncoder
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.schema import Framing


class ReadsSquares(Protocol):
    """What is asked of a model, or of an outline."""

    framing: Framing

    @property
    def visual_tokens(self) -> int: ...
    @property
    def image_size(self) -> int: ...


def sample_encoder(config: Config, tokenizer: Tokenizer, model: ReadsSquares) -> SampleEncoder:
    """How the model's samples become tokens. `tokenizer`: of `vltrain.data.text.tokenizer_sources`. Raises InputError
    for a processor that cannot be trained with."""
    return TemplateEncoder(tokenizer, config.data.template, model.visual_tokens)


def image_reader(config: Config, model: ReadsSquares) -> ImageReader:
    """How the model's images are read."""
    return SquareReader(size=model.image_size, max_pixels=config.data.max_image_pixels, framing=model.framing)
