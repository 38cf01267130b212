"""From the section `stock` of a recipe to a vision-language model of transformers whose trained parameters are exactly
those the recipe means.

As `vltrain.models.mmt.build`: each unit gets its weights, is quantised, gets its adapters and updates and is placed, in
this order, before the next one has weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vltrain.config.model.stock import StockConfig
from vltrain.families.table import family_of
from vltrain.models.adapters import Adapter
from vltrain.models.adapters.table import plain_name
from vltrain.models.backbones.head import replace_head
from vltrain.models.backbones.llm import checkpoint_blocks
from vltrain.models.backbones.packed_decoder import beyond_kernels, prepare_decoder
from vltrain.models.interface import Place
from vltrain.models.materialise import assert_materialised, empty_model
from vltrain.models.peft.lora import peft_parameters
from vltrain.models.quantise import QUANTISED_BITS, quantise_linears
from vltrain.models.stock.model import StockModel
from vltrain.models.stock.parts import Parts, Ties, holders, part_of, units
from vltrain.models.stock.reach import reach_of
from vltrain.models.stock.source import KEY, network_class, stock_config
from vltrain.models.stock.tuning import Tuner, require_hits
from vltrain.models.stock.weights import StockWeights, open_stock
from vltrain.ops.attention_choice import choose_attention

BLOCK_PARTS = ("vision", "llm")


@torch.no_grad()
def build_stock(
    model: StockConfig,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    device: torch.device | str,
    runs_on: torch.device | str,
    place: Place,
) -> StockModel:
    """The network of a recipe, in training mode. Arguments and errors: those of
    `vltrain.models.build.build_model`."""
    on_meta = torch.device(device).type == "meta"
    with torch.device("meta") if on_meta else nullcontext():
        network = empty_stock(model)
        dead = reach_of(network.config).unused
        weights = None if on_meta else open_stock(model, network)
        prepare(network, model, runs_on, dtype, log=not on_meta)
        built = StockModel(network)
        _finish(built, model, weights, dead, dtype, place)
        if activation_checkpointing:
            for part in (built.parts.decoder, built.parts.tower):
                checkpoint_blocks(part, {"use_reentrant": False})
    _assert_trainable(built, trained_parts(model), dead)
    if not on_meta:
        assert_materialised(built)
    return (built if on_meta or place is not None else built.to(device)).train()


def empty_stock(model: StockConfig) -> PreTrainedModel:
    """The network as transformers makes it, every parameter on the meta device, tied weights tied. Raises
    InputError."""
    config = stock_config(model.stock)
    attention: Any = "eager" if model.stock.attention == "eager" else None  # transformers' own choice
    network = empty_model(network_class(config), config, attention)
    network.tie_weights()
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._z3_leaf = True  # pyright: ignore[reportArgumentType] it reads its output layer without calling it
    return network


def prepare(
    network: PreTrainedModel, model: StockConfig, runs_on: torch.device | str, dtype: torch.dtype, *, log: bool
) -> None:
    """Readies the decoder for packed rows and puts in the head that computes losses, in place."""
    decoder = network.get_decoder()
    has_blocks = family_of(network.config.model_type).blocks is not None
    beyond = beyond_kernels(decoder, blocks=has_blocks)
    key, requested = f"{KEY}.attention", model.stock.attention
    prepare_decoder(decoder, choose_attention(requested, decoder.config, runs_on, dtype, key, beyond=beyond, log=log))
    replace_head(network)


def check_sources(model: StockConfig) -> None:
    """Checks names and shapes of the weights' files, without reading them. Raises InputError."""
    open_stock(model, empty_stock(model))


def weight_files(model: StockConfig) -> dict[str, dict[str, Path]]:
    """See `vltrain.models.build.weight_files`."""
    files = open_stock(model, empty_stock(model)).files
    return {f"{KEY}.source": files} if files else {}


def trained_parts(model: StockConfig) -> set[str]:
    """The parts (`StockModel.PARTS`) whose parameters a recipe trains."""
    added = {"adapter", "peft"} if model.places_adapters else set()
    return added | {part for part in ("vision", "projector", "llm") if model.trains(part)}


@dataclass(frozen=True)
class _Unit:
    """What is loaded at once. number: of a block, within `block_of`, the part it is a block of."""

    name: str
    module: nn.Module
    block_of: str | None = None
    number: int = 0


def _units(network: PreTrainedModel, parts: Parts) -> Iterator[_Unit]:
    numbers = {
        block: (part, number)
        for part, blocks in zip(BLOCK_PARTS, (parts.tower_blocks, parts.decoder_blocks))
        for number, block in enumerate(blocks)
    }
    for name, module in units(network, parts):
        part, number = numbers.get(module, (None, 0))
        yield _Unit(name, module, part, number)


def _finish(
    built: StockModel,
    model: StockConfig,
    weights: StockWeights | None,
    dead: frozenset[str],
    dtype: torch.dtype,
    place: Place,
) -> None:
    network, parts = built.network, built.parts
    ties = Ties(network)
    trained = trained_parts(model)
    frozen = {16: torch.bfloat16, 32: torch.float32}.get(model.bits or 0, dtype)
    tuner = Tuner(model, parts)
    for unit in _units(network, parts):
        is_trained = {part_of(f"{unit.name}.{name}") in trained for name, _ in unit.module.named_parameters()}
        mixed = len(is_trained) > 1
        for name, inner in unit.module.named_children() if mixed else (("", unit.module),):
            whole = f"{unit.name}.{name}" if name else unit.name
            _load(whole, inner, weights, part_of(f"{whole}.weight") in trained, frozen)
        ties.renew()
        names = {f"{unit.name}.{name}": parameter for name, parameter in unit.module.named_parameters()}
        for name in dead & names.keys():
            names[name].requires_grad_(False)
        if unit.block_of is not None and not dead.issuperset(names):
            if weights is not None and unit.block_of not in trained and model.bits in QUANTISED_BITS:
                quantise_linears(unit.module, model.bits)
            tuner.insert(unit.module, unit.block_of, unit.number)
        if place is not None:
            place(unit.module)
    require_hits(tuner)
    tuner.log_fused()
    for name, module in holders(network, parts):
        is_trained = part_of(f"{name}.parameter") in trained
        if weights is not None:
            weights.fill(name, module, torch.float32 if is_trained else frozen)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(is_trained)
        if place is not None:
            place(module)
    if weights is not None:
        weights.fill_buffers(network)


def _load(name: str, module: nn.Module, weights: StockWeights | None, trained: bool, frozen: torch.dtype) -> None:
    """Gives a module its weights, in the dtype that they will have."""
    if weights is not None:
        weights.fill(name, module, torch.float32 if trained else frozen)
    module.requires_grad_(trained)


def _assert_trainable(built: StockModel, parts: set[str], dead: frozenset[str]) -> None:
    """By module and by name: what is trained are whole adapters, peft's factors, and of a part's own weights, if it is,
    those that anything depends on."""
    adapters = {one for module in built.modules() if isinstance(module, Adapter) for one in module.parameters()}
    added = adapters | peft_parameters(built.network)
    wrong = []
    for name, parameter in built.named_parameters():
        is_used = plain_name(name.removeprefix("network.")) not in dead
        expected = parameter in added or (is_used and part_of(name) in parts - {"adapter", "peft"})
        if parameter.requires_grad != expected:
            wrong.append(name)
    assert not wrong, f"parameters that are trained but should not be, or the other way round: {wrong[:8]}"
