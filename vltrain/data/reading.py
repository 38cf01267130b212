"""What a recipe's model reads samples and images with: by a template and as squares, or by a stock model's own
processor."""

from __future__ import annotations

from typing import Protocol

from vltrain.config.schema import Config
from vltrain.data.pictures import ImageReader, SquareReader
from vltrain.data.text.encoder import SampleEncoder, TemplateEncoder
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.schema import Framing


class ReadsSquares(Protocol):
    """What is asked of a model, or of an outline."""

    framing: Framing

    @property
    def visual_tokens(self) -> int: ...
    @property
    def image_size(self) -> int: ...


def recipe_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a recipe's model. Raises InputError for what cannot be loaded."""
    if config.model.processor is None:
        return load_tokenizer(*tokenizer_sources(config))
    from vltrain.data.stock.processor import (
        stock_processor,  # loads transformers, which decoding workers can do without
    )
    from vltrain.data.stock.source import StockSource

    return stock_processor(StockSource.of(config.model.processor)).tokenizer


def sample_encoder(config: Config, tokenizer: Tokenizer, model: ReadsSquares) -> SampleEncoder:
    """How the model's samples become tokens. `tokenizer`: of `recipe_tokenizer`. Raises InputError for a processor that
    can't be trained with."""
    if config.model.processor is not None:
        from vltrain.data.stock.encoder import StockEncoder
        from vltrain.data.stock.source import StockSource

        return StockEncoder(StockSource.of(config.model.processor))
    return TemplateEncoder(tokenizer, config.data.template, model.visual_tokens)


def image_reader(config: Config, model: ReadsSquares) -> ImageReader:
    """How the model's images are read."""
    if config.model.processor is not None:
        from vltrain.data.stock.reader import StockReader
        from vltrain.data.stock.source import StockSource

        return StockReader(StockSource.of(config.model.processor), config.data.max_image_pixels)
    return SquareReader(size=model.image_size, max_pixels=config.data.max_image_pixels, framing=model.framing)
