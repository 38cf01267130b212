"""Vision-language models of transformers as the other rooms see them."""

from __future__ import annotations

from vltrain.models.interface import Architecture
from vltrain.models.stock.build import build_stock, check_sources, weight_files
from vltrain.models.stock.published import STOCK

ARCHITECTURE = Architecture(build=build_stock, check_sources=check_sources, weight_files=weight_files, sizes=(STOCK,))
