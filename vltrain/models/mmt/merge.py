"""Linear adapters and LoRA folded into the linear layers that they belong to: a plain Hugging Face network that
computes the same.

An adapter g(z) = M z + b stands in front of the projections of its sublayer. A projection (W, c) of g(z) is one
of z with W' = W M and c' = W b + c, so the adapter can go, at no cost when the model is used. Trade-off: the
merged weights are whole matrices again, rounded to their own dtype, and projections without a bias get one, which the
family's config must have a switch for (LLaMA's `attention_bias`, `mlp_bias`), unless adapters have none
(`model.adapter.bias: false`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vltrain.errors import InputError
from vltrain.models.adapters import Adapter
from vltrain.models.adapters.table import find_adapter, find_module, remove_adapter
from vltrain.models.backbones.family import Blocks
from vltrain.models.backbones.llm import llm_blocks
from vltrain.models.backbones.table import language_of
from vltrain.models.backbones.towers import tower_blocks
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.peft.lora import require_no_prompts
from vltrain.models.peft.low_rank import merge_updates
from vltrain.models.quantise import dequantise_linears


@dataclass
class Rounding:
    """How far weights, as they were written, are from what they should be.

    largest: absolute; relative: of the norm of all of them together.
    """

    largest: float = 0.0
    _off: float = 0.0
    _whole: float = 0.0

    @property
    def relative(self) -> float:
        return (self._off / self._whole) ** 0.5 if self._whole else 0.0

    def add(self, exact: Tensor, written: Tensor) -> None:
        """Of one tensor more."""
        exact = exact.double()
        off = written.double() - exact
        self.largest = max(self.largest, float(off.abs().max()) if off.numel() else 0.0)
        self._off += float(off.square().sum())
        self._whole += float(exact.square().sum())

    def put(self, parameter: nn.Parameter, exact: Tensor) -> None:
        """Writes `exact` into a parameter, in place."""
        parameter.copy_(exact)
        self.add(exact, parameter)


@torch.no_grad()
def merge_adapters(model: MultimodalModel) -> Rounding:
    """Folds every adapter into its readers, in place: the ViT and the LLM are plain transformers models afterwards.

    Quantised layers become fp32 ones of the same function first, so what was tuned around them is kept exactly.
    Products are taken in float64. `model.llm.config` says so where projections got biases. LoRA is folded in first,
    since what an adapter is folded into is the layer with it.

    Returns: what rounding the products to the weights' dtypes changed.

    Raises: InputError, before anything is changed, if the adapters are of a kind that is not linear, the LLM has
    learned prompts, or a family's config can't give projections the biases that they would need.
    """
    require_no_prompts(model.llm)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        require_linear(adapter)
    clip, llm = model.vision.clip, model.llm
    networks: tuple[tuple[Any, Blocks, list[nn.Module]], ...] = (
        (clip, model.vision.tower, tower_blocks(clip)),
        (llm, language_of(llm.config), llm_blocks(llm)),
    )
    for _, family, blocks in networks:
        _require_biases(family, blocks)
    rounding = Rounding()
    dequantise_linears(model)
    merge_updates(model, rounding.put)
    for network, family, blocks in networks:
        for sublayer in family.sublayers:
            got_bias = [_merge(block, family, sublayer, rounding) for block in blocks]
            if any(got_bias):
                _switch_biases_on(network.config, family, sublayer, blocks)
    return rounding


def _readers(block: nn.Module, family: Blocks, sublayer: str) -> list[nn.Linear]:
    """The linear layers that read the sublayer's input."""
    found = (find_module(block, name) for name in family.readers[sublayer])
    return [linear for linear in found if linear is not None]


def _require_biases(family: Blocks, blocks: list[nn.Module]) -> None:
    for block in blocks:
        for sublayer, place in family.places.items():
            adapter: Any = find_adapter(block, place)
            has_constant = adapter is not None and adapter.linear_map()[1] is not None
            holds = all(linear.bias is not None for linear in _readers(block, family, sublayer))
            if has_constant and not holds and sublayer not in family.bias_switches:
                raise InputError(
                    f"model.adapter.bias: found True, but the config of a {family.title} has no switch for biases of "
                    f"the {sublayer}'s linear layers, which adapters with biases make; keep the adapters apart"
                )


def _merge(block: nn.Module, family: Blocks, sublayer: str, rounding: Rounding) -> bool:
    """Folds the adapter in front of that sublayer of `block`, if there is one. Returns whether readers got a bias for
    it."""
    place = family.places[sublayer]
    adapter: Any = find_adapter(block, place)
    if adapter is None:
        return False
    matrix, offset = adapter.linear_map()
    got_bias = False
    for linear in _readers(block, family, sublayer):
        weight = linear.weight.double()
        if offset is not None:
            got_bias = _with_zero_bias(linear) or got_bias
            rounding.put(linear.bias, weight @ offset + linear.bias.double())
        rounding.put(linear.weight, weight @ matrix)
    remove_adapter(block, place)
    return got_bias


def _switch_biases_on(config: Any, family: Blocks, sublayer: str, blocks: list[nn.Module]) -> None:
    """Gives the sublayer's linear layers of all blocks a bias, and says so in the config."""
    for switch in family.bias_switches[sublayer]:
        setattr(config, switch, True)
    for block in blocks:
        for linear in (*_readers(block, family, sublayer), find_module(block, family.writers[sublayer])):
            _with_zero_bias(linear)


def require_linear(adapter: Adapter) -> None:
    """Raises InputError for an adapter that no layer behind it can take in."""
    if not hasattr(adapter, "linear_map"):
        raise InputError(
            f"a {type(adapter).__name__} is not linear and cannot be merged into the layer behind it; keep "
            "the adapters apart (--format adapters)"
        )


def _with_zero_bias(linear: nn.Linear) -> bool:
    """Returns whether it had none before."""
    if linear.bias is not None:
        return False
    linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)), requires_grad=linear.weight.requires_grad)
    return True
