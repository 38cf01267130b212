"""Adapters and low-rank updates in the blocks of a vision-language model of any family, which are found by their names
and shapes.

A block's sublayers are its direct children that hold matrices: MLPs and mixtures of experts are the FFN, attention,
linear attention, Mamba and short convolutions the mixers, of which a block may have two side by side. An adapter stands
in front of a sublayer, whatever norms there are around it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from vltrain.config.model.stock import NETWORKS, LowRankConfig, StockConfig
from vltrain.errors import InputError
from vltrain.models.adapters import Adapter
from vltrain.models.adapters.table import AdapterThenSublayer, make_adapter
from vltrain.models.peft.layers import lora_linear
from vltrain.models.peft.lora import keep_in_fp32
from vltrain.models.quantise import QUANTISED_BITS
from vltrain.models.random import seeded
from vltrain.models.stock.norms import norms_before
from vltrain.models.stock.parts import Parts

logger = logging.getLogger(__name__)

_FFN = re.compile(r"mlp|feed_forward|ffn|ff$|moe|experts")
_MIXER = re.compile(r"attn|attention|mamba|mixer|conv|ssm|recurrent|temporal_block")
_NORM = re.compile(r"norm|(^|_)ln")


class Tuner:
    """Puts into blocks what a recipe asks for, and remembers which patterns found a layer."""

    def __init__(self, model: StockConfig, parts: Parts) -> None:
        self.model = model
        self.blocks = {"vision": parts.tower_blocks, "llm": parts.decoder_blocks}
        self.hits: dict[str, set[str]] = {part: set() for part in NETWORKS}
        self._config = parts.core.config
        self._fused = {part: [0, 0] for part in NETWORKS}  # adapters that take a norm in, and all that may
        for part in NETWORKS if model.places_adapters else ():
            placement = getattr(model.adapter, part)
            if placement != "none" and not self.blocks[part]:
                raise InputError(
                    f"model.adapter.{part}: found {placement!r}, but this model's {part} has no transformer blocks; "
                    "take none"
                )
            kind = getattr(model.stock, part).peft.kind
            if kind in ("dora", "pissa") and model.bits in QUANTISED_BITS and not model.trains(part):
                raise InputError(
                    f"model.stock.{part}.peft.kind: found {kind}, which reads the weights that model.bits "
                    f"{model.bits} packs; take lora or rslora"
                )

    def insert(self, block: nn.Module, part: str, number: int) -> None:
        """What the recipe asks for in a block of `vision` or `llm`, in place; its weights are there, in their bits."""
        if not self.model.places_adapters:
            return
        peft = getattr(self.model.stock, part).peft
        if peft.kind is not None:
            self._insert_updates(block, part, number, peft)
        for sublayer in _chosen(getattr(self.model.adapter, part)):
            names = list(sublayers(block, sublayer))
            if not names:
                raise InputError(
                    f"model.adapter.{part}: found {getattr(self.model.adapter, part)!r}, but block {number} "
                    f"({type(block).__name__}) has no {sublayer} that is known here; take another placement"
                )
            for place in names:
                with seeded(self.model.seed, f"adapter/{part}/{number}/{place}"):
                    adapter = make_adapter(width_of(block), self.model.adapter, part=part)
                self._put_in(block, part, number, place, adapter)

    def _put_in(self, block: nn.Module, part: str, number: int, place: str, adapter: Adapter) -> None:
        norm = None
        fuses = adapter.may_fuse() and torch.get_default_device().type != "meta"  # an outline runs nowhere
        if fuses:
            name = norms_before(self._config)[part][number].get(place)
            norm = block.get_submodule(name) if name is not None and _NORM.search(name) else None
        put_in = AdapterThenSublayer(adapter, block.get_submodule(place), norm)
        setattr(block, place, put_in)
        self._fused[part][0] += put_in.took_norm
        self._fused[part][1] += fuses

    def log_fused(self) -> None:
        """Says where the adapters' kernel takes a norm in; nothing where no adapter may run fused."""
        for part, (taken, adapters) in self._fused.items():
            if adapters:
                logger.info(
                    "fused adapter kernel, %s: %d of %d adapters compute the RMSNorm before them, too; %s",
                    part,
                    taken,
                    adapters,
                    "the others have none that is frozen and read by them alone"
                    if taken < adapters
                    else "no norm is left",
                )

    def _insert_updates(self, block: nn.Module, part: str, number: int, peft: LowRankConfig) -> None:
        assert peft.kind is not None
        for name, linear in list(block.named_modules()):
            matched = [pattern for pattern in peft.targets if _matches(name, pattern)]
            if not isinstance(linear, nn.Linear) or not matched:
                continue
            self.hits[part].update(matched)
            parent, _, leaf = name.rpartition(".")
            with seeded(self.model.seed, f"peft/{part}/{number}/{name}"):
                layer = lora_linear(linear, rank=peft.rank, alpha=peft.alpha, dropout=peft.dropout, kind=peft.kind)
            setattr(block.get_submodule(parent), leaf, layer)
        keep_in_fp32(block)


def require_hits(tuner: Tuner) -> None:
    """Raises InputError for a pattern of `targets` that no linear layer of its part has."""
    for part in NETWORKS if tuner.model.places_adapters else ():
        peft = getattr(tuner.model.stock, part).peft
        missed = [pattern for pattern in peft.targets if pattern not in tuner.hits[part]] if peft.kind else []
        if missed:
            found = {name.rpartition(".")[2]: None for block in tuner.blocks[part] for name in _linears(block)}
            raise InputError(
                f"model.stock.{part}.peft.targets: no linear layer of its blocks is called {missed[0]!r}; "
                f"they have {', '.join(found) or 'none'}"
            )


def sublayers(block: nn.Module, sublayer: str) -> Iterator[str]:
    """Names of a block's mixers (`attention`) or of its FFN (`ffn`), in the order of its children."""
    for name, child in block.named_children():
        if _NORM.search(name) or not any(parameter.ndim > 1 for parameter in child.parameters()):
            continue
        if _FFN.search(name):
            kind = "ffn"
        elif _MIXER.search(name):
            kind = "attention"
        else:
            continue
        if kind == sublayer:
            yield name


def width_of(block: nn.Module) -> int:
    """The width of the states that go through a block: that of its norms."""
    for name, child in block.named_children():
        for parameter in child.parameters() if _NORM.search(name) else ():
            return len(parameter)
    raise InputError(f"model.adapter: a {type(block).__name__} has no norm that says how wide its states are")


def _chosen(placement: str) -> tuple[str, ...]:
    return {"none": (), "both": ("attention", "ffn")}.get(placement, (placement,))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def _linears(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            yield name.removesuffix(".base_layer")
