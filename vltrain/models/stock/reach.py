"""Which weights of a tower its model never uses: blocks behind the layer that LLaVA reads, SigLIP's pooling head.

They are found by a forward and a backward without numbers, on the meta device. A tower whose forward needs numbers (one
that takes images of any size) has none that are left unused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.models.stock.features import POOLED, rows_of
from vltrain.models.stock.parts import part_of, parts_of
from vltrain.models.stock.source import network_class


def unreached(config: PreTrainedConfig) -> frozenset[str]:
    """Names, in a network of that config, of the tower's and projector's parameters that have no part in what it makes
    of an image."""
    key = f"{type(config).__name__} {config.to_dict()}"
    if key not in _FOUND:
        _FOUND[key] = _unreached(copy.deepcopy(config))
    return _FOUND[key]


_FOUND: dict[str, frozenset[str]] = {}  # by config: a run asks several times


def _unreached(config: PreTrainedConfig) -> frozenset[str]:
    with quiet_transformers(), torch.device("meta"), torch.random.fork_rng(devices=[]), torch.enable_grad():
        network = network_class(config)._from_config(config)
        parts = parts_of(network)
        for images in _pictures(parts.tower.config):
            try:
                rows_of(parts.core.get_image_features(**images, return_dict=True)[POOLED]).sum().backward()
            except Exception:
                continue
            return frozenset(
                name for name, parameter in network.named_parameters()
                if parameter.grad is None and part_of(name) != "llm"
            )  # fmt: skip
    return frozenset()


def _pictures(config: Any) -> Iterator[dict[str, Tensor]]:
    """One picture of the tower's size, as families want it: alone, as tiles, with its size."""
    size = getattr(config, "image_size", None)
    if size is None:
        return
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    picture = torch.empty(1, 3, height, width)
    yield {"pixel_values": picture}
    sizes = torch.tensor([[height, width]], device="cpu")
    yield {"pixel_values": torch.empty(1, 2, 3, height, width), "image_sizes": sizes}
    yield {"pixel_values": picture, "image_sizes": sizes}
