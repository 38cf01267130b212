"""Vision-language models of transformers as the other rooms see them."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from vltrain.config.model.stock import StockConfig
from vltrain.models.interface import Architecture
from vltrain.models.stock.build import build_stock, check_sources, weight_files
from vltrain.models.stock.published import STOCK
from vltrain.models.stock.source import stock_config

SMALL_RANK, SMALL_WIDTH = 4, 4


def _resized(model: StockConfig, config: PreTrainedConfig) -> StockConfig:
    """Random weights of a small config in fp32, with ranks and widths of adapters that its layers hold."""
    stock, adapter = model.stock, model.adapter
    parts = {
        name: replace(part, peft=replace(part.peft, rank=min(part.peft.rank, SMALL_RANK), dropout=0.0))
        for name, part in (("vision", stock.vision), ("llm", stock.llm))
    }
    processor = stock.processor or stock.source
    small = replace(stock, source=None, config=config.to_dict(), processor=processor, attention="sdpa", **parts)
    width = SMALL_WIDTH * adapter.groups * adapter.down_groups
    fitting = replace(adapter, dim=min(adapter.dim, width), dropout=0.0, impl="torch")
    return replace(model, stock=small, adapter=fitting, bits=None)


ARCHITECTURE = Architecture(
    build=build_stock,
    check_sources=check_sources,
    weight_files=weight_files,
    sizes=(STOCK,),
    whole=lambda model: stock_config(model.stock),
    resized=_resized,
)
