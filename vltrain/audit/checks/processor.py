"""The processor and the model agree: the chat template writes a picture where a question shows one, and there are as
many placeholders for it as the model makes vectors of it, with the config's own sizes of images and patches and small
widths."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from vltrain.audit.findings import Finding
from vltrain.audit.small.config import shrink
from vltrain.audit.small.pictures import pictures, tokens_of
from vltrain.data.stock.encoder import StockEncoder
from vltrain.data.stock.layouts import layouts_of
from vltrain.data.stock.processor import StockProcessor, stock_processor
from vltrain.data.stock.source import StockSource, find
from vltrain.errors import InputError
from vltrain.files.locate import locate
from vltrain.models.stock.source import network_class
from vltrain.schema import IMAGE_MARKER, Sample, Turn

FILES = ("processor_config.json", "preprocessor_config.json")
WHAT = "placeholders of the processor = vectors of the model"
_ASKED = Sample(
    id="a picture and a question",
    images=("picture",),
    turns=(Turn(role="user", text=f"{IMAGE_MARKER}\nred?"), Turn(role="assistant", text="yes")),
)


def has_processor(place: str) -> bool:
    """Whether a folder or a hub's repository holds one."""
    return any(find(locate(place), name) is not None for name in FILES)


def require_readable(source: StockSource) -> None:
    """Raises InputError unless the processor can be loaded, and its chat template writes a question about a picture."""
    processor = stock_processor(source)
    picture = next(iter(pictures()))
    try:
        StockEncoder(source).sample(_ASKED, lambda _: (picture.height, picture.width))
    except InputError as error:
        told = str(error).removeprefix(f"sample '{_ASKED.id}': ")
        raise InputError(f"{source.key}: {processor.where}: {_ASKED.id} can't be packed: {told}") from None


@torch.no_grad()
def check_processor(config: PreTrainedConfig, source: StockSource) -> Finding:
    """One finding. `config`: of the model, as large as it is."""
    network: Any = network_class(config)._from_config(shrink(config, keep_pictures=True).config).eval()
    try:
        require_readable(source)
        where = _difference(network.base_model, stock_processor(source))
    except InputError as error:
        where = str(error)
    return Finding(what=WHAT, passed=not where, bound=None, where=where)


def _difference(core: Any, processor: StockProcessor) -> str:
    """In words; "" where they agree. Raises InputError for a picture that the processor refuses."""
    for picture in pictures():
        name = f"a picture of {picture.width} x {picture.height} pixels"
        written = layouts_of(processor).of((picture.height, picture.width), 1).tokens
        tensors, _ = processor.process([[picture]])
        try:
            made = tokens_of(core, {name: one for name, one in tensors.items() if torch.is_tensor(one)})
        except Exception as error:  # a family's own code, given sizes that are not its own
            told = " ".join(str(error).split())[:200]
            return (
                f"{name}: the model refuses what the processor makes of it ({type(error).__name__}: {told}); take the "
                "processor that belongs to the model"
            )
        if written != made:
            return f"{name}: {written} placeholders, {made} vectors; take the processor that belongs to the model"
    return ""
