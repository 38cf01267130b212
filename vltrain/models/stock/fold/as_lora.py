"""Adapters and low-rank updates of a vision-language model as one LoRA of transformers' own network, which is what they
are: see `vltrain.models.mmt.as_lora`, whose arithmetic it is.

DoRA scales the rows of W + s B A and is none: it is written as peft's DoRA, where nothing else is in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vltrain.config.model.stock import NETWORKS, StockConfig
from vltrain.errors import InputError
from vltrain.models.adapters.table import plain_name
from vltrain.models.mmt.as_lora import (
    WHOLE,
    Factors,
    Update,
    has_adapters,
    require_low_rank_adapter,
    require_whole,
    scaled_factors,
    update_of,
)
from vltrain.models.peft import lora
from vltrain.models.peft.layers import has_lora
from vltrain.models.stock.fold.readers import linears_of
from vltrain.models.stock.model import StockModel


def require_low_rank(model: StockConfig) -> None:
    """Raises InputError, by the recipe alone, if what is tuned is no low-rank update of linear layers (and a projector
    beside them), naming what is not."""
    for part in NETWORKS:
        if model.trains(part):
            raise InputError(
                f"model.stock: the {part}'s own weights are tuned too, and a LoRA applies to the untuned ones; {WHOLE}"
            )
        require_low_rank_adapter(model.adapter, part)
        require_whole(f"model.stock.{part}.peft.kind", _kind(model, part), model.bits)
    tuned = [part for part in NETWORKS if has_adapters(model.adapter, part) or _kind(model, part) is not None]
    if not model.places_adapters or not tuned:
        raise InputError(
            f"model: neither adapters nor low-rank updates are in it, so there is no LoRA to export; {WHOLE}"
        )
    if uses_dora(model):
        _require_dora_alone(model)


def _require_dora_alone(model: StockConfig) -> None:
    settings = [getattr(model.stock, part).peft for part in NETWORKS if _kind(model, part) is not None]
    same = len({(one.kind, one.rank, one.alpha) for one in settings}) == 1
    if not same or any(has_adapters(model.adapter, part) for part in NETWORKS):
        raise InputError(
            "model.stock: found dora beside adapters or other updates, which one folder of peft's cannot hold; "
            f"expected dora alone, of one rank and alpha; {WHOLE}"
        )


def _kind(model: StockConfig, part: str) -> str | None:
    return getattr(model.stock, part).peft.kind


def uses_dora(model: StockConfig) -> bool:
    """Whether the updates are DoRA's."""
    return any(_kind(model, part) == "dora" for part in NETWORKS)


@torch.no_grad()
def factors_of(model: StockModel) -> Factors:
    """The factors of every layer with an update, as they are now: of an untuned model what PiSSA took out of the
    weights."""
    return {name: scaled_factors(linear) for name, linear, _ in _linears(model) if has_lora(linear)}


@torch.no_grad()
def lora_updates(model: StockModel, taken_out: Factors) -> Iterator[tuple[str, Update]]:
    """Name in transformers' network, and update of each linear layer that has one.

    Args:
        taken_out: of PiSSA's layers, `factors_of` before tuning.

    Raises: InputError for adapters that are no linear map, that do not hand on what goes in, or that stand before a
    layer of which it is not known what it reads.
    """
    for name, linear, adapter in _linears(model):
        if adapter is None and not has_lora(linear):
            continue
        update = update_of(linear, adapter)
        yield name, update.less(taken_out[name]) if name in taken_out else update


def dora_tensors(model: StockModel) -> dict[str, Tensor]:
    """peft's tensors of DoRA's layers by their names in transformers' network, as they are."""
    return lora.dora_tensors((name, linear) for name, linear, _ in _linears(model) if has_lora(linear))


def projector_modules(model: StockModel) -> list[str]:
    """Names of the largest modules that hold trained parameters of the projector and no other ones: peft's
    `modules_to_save`.

    Raises: InputError for such a parameter that stands alone in a module with others.
    """
    network = model.network
    trained = {
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and model.part_of(name) == "projector"
    }
    chosen: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # which peft does not save
            continue
        inner = {f"{name}.{one}" for one, _ in module.named_parameters()}
        if name and inner and inner <= trained and not any(name.startswith(f"{one}.") for one in chosen):
            chosen.append(name)
    left = [name for name in trained if not any(name.startswith(f"{one}.") for one in chosen)]
    if left:
        raise InputError(
            f"model.stock.projector: {sorted(left)[0]} is tuned and is no module of its own, which a folder of peft's "
            "cannot hold; take --format merged"
        )
    return chosen


def _linears(model: StockModel) -> Iterator[tuple[str, Any, nn.Module | None]]:
    names = {module: plain_name(name) for name, module in model.network.named_modules()}
    for block in model.blocks:
        for inner, linear, adapter in linears_of(block):
            yield f"{names[block]}.{inner}", linear, adapter
