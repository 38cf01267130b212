"""Vision-language models of transformers as the other rooms see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedConfig

from vltrain.config.model.stock import StockConfig
from vltrain.models.backbones.packed_decoder import mixers_of
from vltrain.models.interface import Architecture
from vltrain.models.resized import packed_bits, resized_adapter, resized_updates
from vltrain.models.stock.build import build_stock, check_sources, empty_stock, trained_parts, weight_files
from vltrain.models.stock.published import STOCK
from vltrain.models.stock.source import stock_config


def _resized(model: StockConfig, small: Mapping[str, PreTrainedConfig]) -> StockConfig:
    stock = model.stock
    parts = {name: replace(part, peft=resized_updates(part.peft)) for name, part in
             (("vision", stock.vision), ("llm", stock.llm))}  # fmt: skip
    section = replace(
        stock,
        source=None,
        config=small["model"].to_dict(),
        processor=stock.processor or stock.source,
        attention="sdpa",
        **parts,
    )
    return replace(model, stock=section, adapter=resized_adapter(model.adapter), bits=packed_bits(model.bits))


def _not_compilable(model: StockConfig) -> str | None:
    mixers = mixers_of(empty_stock(model).get_decoder())
    if not mixers:
        return None
    return (
        f"an LLM with {type(mixers[0]).__name__}, which mixes tokens otherwise than by attention (linear attention, "
        "Mamba, a short convolution) and runs on groups of segments, whose number and lengths every row has anew"
    )


ARCHITECTURE = Architecture(
    build=build_stock,
    check_sources=check_sources,
    weight_files=weight_files,
    sizes=(STOCK,),
    trained_parts=trained_parts,
    configs=lambda model: {"model": stock_config(model.stock)},
    resized=_resized,
    not_compilable=_not_compilable,
)
