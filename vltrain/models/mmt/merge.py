"""Linear adapters and LoRA folded into the linear layers that they belong to: a plain Hugging Face network that
computes the same.

An adapter g(z) = M z + b stands between a norm and the projections of its sublayer. A projection (W, c) of g(z) is one
of z with W' = W M and c' = W b + c, so the adapter can go, at no cost when the model is used. Trade-off: the
merged weights are whole matrices again, rounded to their own dtype, and LLaMA's projections get biases, which its
config has a switch for (`attention_bias`, `mlp_bias`), unless adapters have none (`model.adapter.bias: false`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vltrain.errors import InputError
from vltrain.models.adapters import Adapter
from vltrain.models.backbones.family import Language
from vltrain.models.backbones.llm import llm_blocks
from vltrain.models.backbones.table import language_of
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

    Raises: InputError, before anything is changed, if the adapters are of a kind that is not linear, or the LLM has
    learned prompts.
    """
    require_no_prompts(model.llm)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        _require_linear(adapter)
    tower, language = model.vision.tower, language_of(model.llm.config)
    _require_bias_switches(model, language)
    rounding = Rounding()
    dequantise_linears(model)
    merge_updates(model.llm, rounding.put)
    for block in model.vision.live_blocks:
        for sublayer, norm in tower.norms.items():
            _merge(block, norm, tower.readers[sublayer], rounding)
    for sublayer, norm in language.norms.items():
        got_bias = [_merge(block, norm, language.readers[sublayer], rounding) for block in llm_blocks(model.llm)]
        if any(got_bias):
            for block in llm_blocks(model.llm):
                writer: Any = block.get_submodule(language.writers[sublayer])
                _with_zero_bias(writer)
            setattr(model.llm.config, language.bias_switches[sublayer], True)
    return rounding


def _require_bias_switches(model: MultimodalModel, language: Language) -> None:
    for block in llm_blocks(model.llm):
        for sublayer, norm in language.norms.items():
            adapter: Any = getattr(getattr(block, norm), "adapter", None)
            has_constant = adapter is not None and adapter.linear_map()[1] is not None
            if has_constant and sublayer not in language.bias_switches:
                raise InputError(
                    f"model.adapter.bias: found True, but the config of a {language.title} has no switch for biases of "
                    f"the {sublayer}'s linear layers, which adapters with biases make; keep the adapters apart"
                )


def _merge(block: nn.Module, norm_name: str, readers: tuple[str, ...], rounding: Rounding) -> bool:
    """Folds the adapter behind that norm of `block`, if there is one. Returns whether the readers need a bias for
    it."""
    place = getattr(block, norm_name)
    if not isinstance(place, nn.Sequential):
        return False
    matrix, offset = place.adapter.linear_map()
    for name in readers:
        linear = block.get_submodule(name)
        weight = linear.weight.double()
        if offset is not None:
            _with_zero_bias(linear)
            rounding.put(linear.bias, weight @ offset + linear.bias.double())
        rounding.put(linear.weight, weight @ matrix)
    setattr(block, norm_name, place.norm)
    return offset is not None


def _require_linear(adapter: Adapter) -> None:
    if not hasattr(adapter, "linear_map"):
        raise InputError(
            f"a {type(adapter).__name__} is not linear and cannot be merged into the layer behind it; keep "
            "the adapters apart"
        )


def _with_zero_bias(linear: nn.Linear) -> None:
    if linear.bias is None:
        linear.bias = nn.Parameter(
            linear.weight.new_zeros(len(linear.weight)), requires_grad=linear.weight.requires_grad
        )
