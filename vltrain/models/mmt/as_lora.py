"""Adapters in front of linear layers, written as low-rank updates of these layers, which is what they are.

Behind an adapter g(z) = z + s U D z + b a linear layer (W, c) computes W g(z) + c = (W z + c) + B A z + W b: LoRA's
update with A = D, B = s W U, and a constant W b, which adapters without biases (`model.adapter.bias: false`) do not
have. LoRA by peft inside of the layer, W' = W + t B' A', is part of the W that the adapter's output meets, and an
update of its own besides: A = [D; A'], B = [s W' U, t B'], constant W' b. PiSSA's factors begin as a part of the
layer's own weight: t B' A' - t B0 A0 is what was added to it, an update of twice the rank. DoRA, which scales the rows
of W + t B' A', is no such update: it is written as peft's DoRA, where a network has no adapters.

Products are taken in float64, of the weights that are served: dequantised where the frozen ones are in 4 or 8 bits. An
adapter that several layers read is written for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, cast

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
from vltrain.models.peft import lora
from vltrain.models.peft.layers import NAME, has_lora
from vltrain.models.peft.lora import low_rank_factors, outer_linears, require_no_prompts
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

    def less(self, taken_out: tuple[Tensor, Tensor]) -> Update:
        """Without what the layer's factors were before tuning, see `factors_of`."""
        up, down = taken_out
        return Update(torch.cat([self.down, down]), torch.cat([self.up, -up], dim=1), self.constant)


Factors: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""By a linear layer's name, s B and A, float64."""


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


def require_whole(key: str, kind: str | None, bits: int | None) -> None:
    """Raises InputError for PiSSA in 16 bits: what is left of the weights is rounded once more, which no LoRA on the
    weights themselves does."""
    if kind == "pissa" and bits == 16:
        raise InputError(
            f"{key}: found 'pissa' with model.bits 16, which rounds what its factors leave of the weights; {WHOLE}"
        )


def require_low_rank(model: MmtConfig) -> None:
    """Raises InputError, by the recipe alone, if what is tuned is no low-rank update of linear layers, naming what is
    not."""
    for part in PARTS:
        require_low_rank_adapter(model.adapter, part)
        kind = peft_kind(model, part)
        if kind == "adaption_prompt":
            raise InputError(
                f"model.{part}.peft.kind: found '{kind}': its prompts depend on the states, which no LoRA does; {APART}"
            )
        if kind == "dora" and has_adapters(model.adapter, part):
            raise InputError(
                f"model.{part}.peft.kind: found 'dora' beside model.adapter.{part} "
                f"'{getattr(model.adapter, part)}': a folder of peft's is DoRA's as a whole, and adapters are not; "
                f"{WHOLE}"
            )
        require_whole(f"model.{part}.peft.kind", kind, model.bits)
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
            "model.adapter.vision and model.adapter.llm are none, and model.vision.peft.kind and model.llm.peft.kind "
            f"null: there is no LoRA to export; {WHOLE}"
        )


def peft_kind(model: MmtConfig, part: str) -> str | None:
    """What peft puts into `llm` or `vision`."""
    return getattr(model, part).peft.kind


def has_constant(model: MmtConfig, part: str) -> bool:
    """Whether updates of `llm` or `vision` have a constant."""
    return has_adapters(model.adapter, part) and model.adapter.bias


def lora_rank(model: MmtConfig, part: str) -> int:
    """The largest rank of the updates of `llm` or `vision`; 0 where it has none."""
    peft = getattr(model, part).peft
    own_rank = peft.rank * (2 if peft.kind == "pissa" else 1) if peft.kind in LOW_RANK else 0
    if not has_adapters(model.adapter, part):
        return own_rank
    placement = getattr(model.adapter, part)
    sublayers = ("attention", "ffn") if placement == "both" else (placement,)
    families: Iterable[Blocks] = LANGUAGES.values() if part == "llm" else TOWERS.values()
    readers = (layer for family in families for sublayer in sublayers for layer in family.readers[sublayer])
    behind = {layer.rpartition(".")[2] for layer in readers}
    return max(model.adapter.dim + (own_rank if behind & set(peft.targets) else 0), own_rank)


@torch.no_grad()
def factors_of(model: MultimodalModel, part: str) -> Factors:
    """The factors of every layer of `llm` or `vision` with an update, as they are now: of an untuned model what PiSSA
    took out of the weights."""
    return {name: scaled_factors(linear) for name, linear, _ in _linears(model, part) if has_lora(linear)}


def dora_tensors(model: MultimodalModel, part: str) -> dict[str, Tensor]:
    """peft's tensors of the DoRA of `llm` or `vision`, by the layers' names in transformers' network."""
    return lora.dora_tensors((name, linear) for name, linear, _ in _linears(model, part) if has_lora(linear))


@torch.no_grad()
def lora_updates(
    model: MultimodalModel, part: str, taken_out: Factors = MappingProxyType({})
) -> Iterator[tuple[str, Update]]:
    """Name in transformers' network, and update of each linear layer of `llm` or `vision` that has one.

    Args:
        taken_out: of PiSSA's layers, `factors_of` before tuning.

    Raises: InputError for adapters that are no linear map, or that do not hand on what goes in, and for prompts.
    """
    if part == "llm":
        require_no_prompts(model.llm)
    for name, linear, adapter in _linears(model, part):
        if adapter is not None or has_lora(linear):
            update = update_of(linear, adapter)
            yield name, update.less(taken_out[name]) if name in taken_out else update


def _linears(model: MultimodalModel, part: str) -> Iterator[tuple[str, Any, nn.Module | None]]:
    """(name in transformers' network, linear layer, the adapter whose output it reads) of all in the blocks."""
    if part == "llm":
        prefix, blocks, family = "model.layers", llm_blocks(model.llm), cast(Blocks, language_of(model.llm.config))
    else:
        family = model.vision.tower
        prefix, blocks = family.layers, model.vision.live_blocks
    for number, block in enumerate(blocks):
        before = {layer: family.places[sublayer] for sublayer, layers in family.readers.items() for layer in layers}
        for name, linear in ((plain_name(name), linear) for name, linear in outer_linears(block)):
            adapter = find_adapter(block, before[name]) if name in before else None
            yield f"{prefix}.{number}.{name}", linear, adapter


def scaled_factors(linear: Any) -> tuple[Tensor, Tensor]:
    """(s B, A) of a linear layer with LoRA or one of its kin, float64."""
    first, second = low_rank_factors(linear)
    return linear.scaling[NAME] * second.double(), first.double()


def update_of(linear: Any, adapter: nn.Module | None) -> Update:
    """Of a linear layer with LoRA, behind an adapter, or both. Raises InputError for an adapter that is no low-rank
    map."""
    own = has_lora(linear)
    weight = _weight(linear.get_base_layer() if own else linear)
    downs, ups, constant = [], [], None
    if own:
        up, down = scaled_factors(linear)
        downs.append(down)
        ups.append(up)
        weight = weight + up @ down
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
