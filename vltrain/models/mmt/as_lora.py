"""Adapters in front of linear layers, written as low-rank updates of these layers, which is what they are.

Behind an adapter g(z) = z + s U D z + b a linear layer (W, c) computes W g(z) + c = (W z + c) + B A z + W b: LoRA's
update with A = D, B = s W U, and a constant W b, which adapters without biases (`model.adapter.bias: false`) do not
have. LoRA by peft inside of the layer, W' = W + t B' A', is part of the W that the adapter's output meets, and an
update of its own besides: A = [D; A'], B = [s W' U, t B'], constant W' b.

Products are taken in float64, of the weights that are served: dequantised where the frozen ones are in 4 or 8 bits. An
adapter that several layers read is written for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vltrain.config.model.mmt import LOW_RANK, AdapterConfig, MmtConfig
from vltrain.errors import InputError
from vltrain.models.adapters.bottleneck import RepAdapter
from vltrain.models.adapters.table import adapter_kind, find_adapter, plain_name
from vltrain.models.backbones.family import Blocks
from vltrain.models.backbones.llm import llm_blocks
from vltrain.models.backbones.table import LANGUAGES, TOWERS, language_of
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.peft.layers import NAME, has_lora
from vltrain.models.peft.lora import lora_factors, outer_linears, require_no_prompts
from vltrain.models.quantise import FrozenLinear

PARTS = ("llm", "vision")
WHOLE, APART = "take --format merged for the whole model", "take --format adapters, which keeps them apart"


@dataclass(frozen=True)
class Update:
    """What is added to a linear layer's output: `up` (`down` x) + `constant`; float64 [r, in], [out, r], and [out] or
    None."""

    down: Tensor
    up: Tensor
    constant: Tensor | None


def has_adapters(config: AdapterConfig, part: str) -> bool:
    """Whether adapters stand in a network, `llm` or `vision`."""
    return getattr(config, part) != "none"


def require_low_rank_adapter(config: AdapterConfig, part: str) -> None:
    """Raises InputError, by the recipe alone, if adapters stand in `llm` or `vision` that are no low-rank update of the
    layers behind them."""
    if not has_adapters(config, part):
        return
    kind = adapter_kind(config, part)
    if not hasattr(kind, "low_rank_map"):
        key = "vision_kind" if part == "vision" and config.vision_kind is not None else "kind"
        raise InputError(
            f"model.adapter.{key}: found '{getattr(config, key)}': a {kind.__name__} is not linear, as a LoRA must be; "
            f"{APART}"
        )
    if issubclass(kind, RepAdapter) and not config.residual:
        raise InputError(
            "model.adapter.residual: found False: without the residual, the update of the layer behind has full rank; "
            f"{WHOLE}"
        )


def require_low_rank(model: MmtConfig) -> None:
    """Raises InputError, by the recipe alone, if what is tuned is no low-rank update of linear layers, naming what is
    not."""
    for part in PARTS:
        require_low_rank_adapter(model.adapter, part)
    no_lora = {
        "adaption_prompt": f"its prompts depend on the states, which no LoRA does; {APART}",
        "dora": f"it scales the rows of the weights, which no LoRA does; {WHOLE}",
        "pissa": f"its factors began as a part of the weights, and a LoRA applies to the whole ones; {WHOLE}",
    }
    if model.llm.peft.kind in no_lora:
        raise InputError(f"model.llm.peft.kind: found '{model.llm.peft.kind}': {no_lora[model.llm.peft.kind]}")
    if model.tune == "full" or model.vision.train or model.llm.train:
        key = (
            "model.tune: found 'full'"
            if model.tune == "full"
            else f"model.{'vision' if model.vision.train else 'llm'}.train: found True"
        )
        raise InputError(
            f"{key}: the networks' own weights are tuned too, and a LoRA applies to the untuned ones; {WHOLE}"
        )
    if not any(lora_rank(model, part) for part in PARTS):
        raise InputError(
            "model.adapter.vision and model.adapter.llm are none, and model.llm.peft.kind is null: there is no "
            f"LoRA to export; {WHOLE}"
        )


def has_constant(model: MmtConfig, part: str) -> bool:
    """Whether updates of `llm` or `vision` have a constant."""
    return has_adapters(model.adapter, part) and model.adapter.bias


def lora_rank(model: MmtConfig, part: str) -> int:
    """The largest rank of the updates of `llm` or `vision`; 0 where it has none."""
    own = model.llm.peft if part == "llm" and model.llm.peft.kind in LOW_RANK else None
    if not has_adapters(model.adapter, part):
        return own.rank if own is not None else 0
    placement = getattr(model.adapter, part)
    sublayers = ("attention", "ffn") if placement == "both" else (placement,)
    families: Iterable[Blocks] = LANGUAGES.values() if part == "llm" else TOWERS.values()
    readers = (layer for family in families for sublayer in sublayers for layer in family.readers[sublayer])
    behind = {layer.rpartition(".")[2] for layer in readers}
    targets = set(own.targets) if own is not None else set()
    return max(
        model.adapter.dim + (own.rank if own is not None and behind & targets else 0),
        own.rank if own is not None else 0,
    )


@torch.no_grad()
def lora_updates(model: MultimodalModel, part: str) -> Iterator[tuple[str, Update]]:
    """Name in transformers' network, and update of each linear layer of `llm` or `vision` that has one.

    Raises: InputError for adapters that are no linear map, or that do not hand on what goes in, and for prompts.
    """
    if part == "llm":
        require_no_prompts(model.llm)
        prefix, blocks, family = "model.layers", llm_blocks(model.llm), cast(Blocks, language_of(model.llm.config))
    else:
        family = model.vision.tower
        prefix, blocks = family.layers, model.vision.live_blocks
    for number, block in enumerate(blocks):
        before = {layer: family.places[sublayer] for sublayer, layers in family.readers.items() for layer in layers}
        for name, linear in ((plain_name(name), linear) for name, linear in outer_linears(block)):
            adapter = find_adapter(block, before[name]) if name in before else None
            if adapter is not None or has_lora(linear):
                yield f"{prefix}.{number}.{name}", update_of(linear, adapter)


def update_of(linear: nn.Module, adapter: nn.Module | None) -> Update:
    """Of a linear layer with LoRA, behind an adapter, or both. Raises InputError for an adapter that is no low-rank
    map."""
    own = lora_factors(linear)
    weight = _weight(linear.get_base_layer() if own else linear)
    downs, ups, constant = [], [], None
    if own:
        first, second = (factor.weight.double() for factor in own)
        downs.append(first)
        ups.append(linear.scaling[NAME] * second)
        weight = weight + ups[0] @ first
    if adapter is not None:
        down, up, offset = _low_rank(adapter)
        downs.insert(0, down)
        ups.insert(0, weight @ up)
        constant = None if offset is None else weight @ offset
    return Update(torch.cat(downs), torch.cat(ups, dim=1), constant)


def _low_rank(adapter: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    if not hasattr(adapter, "low_rank_map"):
        raise InputError(
            f"a {type(adapter).__name__} is not linear and cannot be written as a LoRA of the layer behind it"
        )
    return adapter.low_rank_map()


def _weight(linear: nn.Module) -> Tensor:
    return (linear.dequantised(torch.float32) if isinstance(linear, FrozenLinear) else linear.weight).double()
