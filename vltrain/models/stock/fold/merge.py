"""Adapters and low-rank updates folded into the layers of a vision-language model: a plain network of its family that
computes the same. What `vltrain.models.mmt.merge` says of the arithmetic holds here.

An adapter's constant goes into a bias. Where the family's layers have none, its config may have a switch for them; a
family without one can only take in adapters without biases (`model.adapter.bias: false`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vltrain.errors import InputError
from vltrain.models.adapters.table import plain_name, remove_adapter
from vltrain.models.materialise import empty_model
from vltrain.models.mmt.merge import Rounding, require_linear
from vltrain.models.peft.low_rank import merge_updates
from vltrain.models.quantise import dequantise_linears
from vltrain.models.stock.fold.readers import adapted_sublayers, readers
from vltrain.models.stock.model import StockModel
from vltrain.models.stock.source import network_class

# Settings of transformers' configs that give linear layers of their blocks a bias.
SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "attention_in_bias", "bias")


@torch.no_grad()
def merged_network(model: StockModel) -> tuple[PreTrainedModel, Rounding]:
    """transformers' own network with everything that was tuned in its weights, in fp32 where that was; `model` is used
    up.

    Returns: it, and what rounding the products to the weights' dtypes changed.

    Raises: InputError for adapters that are no linear map or stand before a layer of which it is not known what it
    reads, and for constants that the family's layers cannot take.
    """
    rounding = Rounding()
    for block in model.blocks:
        for _, adapter, sublayer in adapted_sublayers(block):
            readers(sublayer)
            require_linear(adapter)
    dequantise_linears(model.network)
    merge_updates(model.network, rounding.put)
    for block in model.blocks:
        for name, adapter, sublayer in list(adapted_sublayers(block)):
            _fold(adapter, sublayer, rounding)
            remove_adapter(block, name)
    return _plain(model.network), rounding


def _fold(adapter: Any, sublayer: nn.Module, rounding: Rounding) -> None:
    matrix, offset = adapter.linear_map()
    for linear in readers(sublayer).values():
        assert isinstance(linear, nn.Linear)
        own: Any = linear.weight
        weight = own.double()
        if offset is not None and offset.any():  # an untuned adapter's is zero
            bias: Any = linear.bias
            if bias is None:
                bias = linear.bias = nn.Parameter(torch.zeros(len(weight)), requires_grad=False)
            rounding.put(bias, weight @ offset + bias.double())
        rounding.put(own, weight @ matrix)


def _plain(network: PreTrainedModel) -> PreTrainedModel:
    """A network of transformers' class with the weights of a merged one, whose modules may be ours."""
    weights = {plain_name(name): value for name, value in network.state_dict(keep_vars=True).items()}
    plain = _with_biases(network, {name for name in weights if name.endswith(".bias")})
    for name, parameter in plain.named_parameters():
        if name not in weights:
            assert name.endswith(".bias"), name
            weights[name] = nn.Parameter(torch.zeros(parameter.shape), requires_grad=False)
    own = set(plain.state_dict())
    plain.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=True, assign=True)
    plain.tie_weights()
    return plain.eval()


def _with_biases(network: PreTrainedModel, needed: set[str]) -> PreTrainedModel:
    """An empty network of the family whose layers have those biases, and as few more as its config can say."""
    config = copy.deepcopy(network.config)
    lacking = needed - _biases(config)
    for part, name in _switches(config):
        if not lacking:
            break
        setattr(part, name, True)
        still = lacking - _biases(config)
        setattr(part, name, still != lacking)
        lacking = still
    if lacking:
        first = sorted(lacking)[0]
        raise InputError(
            f"model.adapter.bias: found True, but {type(network).__name__} has no {first}, which an adapter with "
            f"biases needs, and its config no setting for it ({len(lacking)} such); train with model.adapter.bias "
            "false, or take --format adapters"
        )
    return _empty(config)


def _switches(config: Any) -> Iterator[tuple[Any, str]]:
    """(a part's config, the name of a setting in it) of all that are off."""
    parts = [config.get_text_config(), getattr(config, "vision_config", None), config]
    for part in parts:
        for name in SWITCHES if part is not None else ():
            if getattr(part, name, None) is False:
                yield part, name


def _biases(config: Any) -> set[str]:
    return {name for name, _ in _empty(config).named_parameters() if name.endswith(".bias")}


def _empty(config: Any) -> PreTrainedModel:
    attention: Any = None  # transformers' own choice
    return empty_model(network_class(config), copy.deepcopy(config), attention)
