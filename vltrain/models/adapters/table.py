"""The kinds of adapters by name, and how they get into a network.

An adapter stands in front of a sublayer, attention or MLP. It is put in by replacement: a block's norm becomes a
`Sequential` of norm and adapter or, in a post-norm block that has none there, the sublayer becomes adapter and
sublayer. So no forward is patched, and checkpointing, compilation and ZeRO's hooks see ordinary modules. Every adapter
starts as the identity, so that training starts from the pretrained network's function.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor, nn

from vltrain.config.model.mmt import AdapterConfig
from vltrain.errors import InputError, nearest
from vltrain.models.adapters.base import Adapter
from vltrain.models.adapters.bottleneck import BottleneckAdapter, RepAdapter
from vltrain.models.adapters.loha import LohaAdapter, LohaRouterAdapter, LohaSiluAdapter
from vltrain.models.adapters.norms import give_back, take
from vltrain.models.adapters.router import ConcatRouterAdapter, RouterAdapter, WeightedBottleneckAdapter
from vltrain.models.adapters.routing import Routing
from vltrain.models.random import seeded

ADAPTERS: dict[str, type[Adapter]] = {
    "bottleneck": BottleneckAdapter,
    "bottleneck_weighted": WeightedBottleneckAdapter,
    "repadapter": RepAdapter,
    "router": RouterAdapter,
    "router_concat": ConcatRouterAdapter,
    "loha_weighted": LohaAdapter,
    "loha_router": LohaRouterAdapter,
    "loha_silu": LohaSiluAdapter,
}

NOT_OF_A_KIND = {"kind", "vision_kind", "vision", "llm"}  # fields of AdapterConfig that every kind obeys


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Where adapters may stand in a network's blocks.

    norms      by sublayer (attention, ffn), the attribute name of the norm right before it: {"attention":
               "input_layernorm", ...}; a sublayer may lack one
    sublayers  by sublayer, its own attribute name
    width      of the states
    """

    norms: Mapping[str, str]
    sublayers: Mapping[str, str]
    width: int

    def place(self, sublayer: str) -> str:
        """The attribute of a block that an adapter in front of the sublayer is put into."""
        return self.norms.get(sublayer, self.sublayers[sublayer])


class NormThenAdapter(nn.Sequential):
    """A block's norm and the adapter behind it: by turns, or in one kernel where the adapter has one that takes in the
    norm."""

    def __init__(self, norm: nn.Module, adapter: Adapter) -> None:
        super().__init__(OrderedDict(norm=norm, adapter=adapter))
        if adapter.takes_norm:
            adapter.take_norm(norm)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Parameters of modules below that the forward reads without calling them, which ZeRO-3 therefore has to gather
        for this module."""
        return list(self.norm.parameters()) if self.adapter.takes_norm else []

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., d] -> [..., d]."""
        return self.adapter(x, self.norm) if self.adapter.takes_norm else super().forward(x)


class AdapterThenSublayer(nn.Module):
    """An adapter and the sublayer that it stands in front of. Called as the sublayer is.

    Args:
        norm: of the block, right before it; nothing else reads its states. Where the adapter's kernel takes it in, it
            hands its input on (`TakenNorm`). None: there is none, or others read it too.
    """

    def __init__(self, adapter: Adapter, sublayer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.adapter, self.sublayer = adapter, sublayer
        self._norms: list[nn.Module] = []  # a child of the block's, not of this module
        if norm is not None and adapter.takes_norm and adapter.take_norm(norm):
            take(norm)
            self._norms.append(norm)

    @property
    def took_norm(self) -> bool:
        """Whether the adapter computes the norm before it, too."""
        return bool(self._norms)

    def give_norm_back(self) -> None:
        """Lets the norm compute again, in place: the adapter leaves the block."""
        while self._norms:
            give_back(self._norms.pop())

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """See `NormThenAdapter`."""
        return [parameter for norm in self._norms for parameter in norm.parameters()]

    def _adapted(self, states: Tensor) -> Tensor:
        return self.adapter(states, *self._norms)

    def forward(self, *given: Any, **named: Any) -> Any:
        """The states [..., d] are the first argument, or `hidden_states`."""
        if given:
            return self.sublayer(self._adapted(given[0]), *given[1:], **named)
        return self.sublayer(**{**named, "hidden_states": self._adapted(named["hidden_states"])})


def find_adapter(block: nn.Module, place: str) -> Adapter | None:
    """The adapter that `insert_adapters` put in at a block's `place`, the norm's or the sublayer's name; None: none."""
    found = getattr(block, place)
    return cast(Adapter, found.adapter) if isinstance(found, (NormThenAdapter, AdapterThenSublayer)) else None


def remove_adapter(block: nn.Module, place: str) -> None:
    """Takes out the adapter at a block's `place`, if there is one."""
    found: Any = getattr(block, place)
    if isinstance(found, (NormThenAdapter, AdapterThenSublayer)):
        if isinstance(found, AdapterThenSublayer):
            found.give_norm_back()
        setattr(block, place, found.norm if isinstance(found, NormThenAdapter) else found.sublayer)


def plain_name(name: str) -> str:
    """A module's or parameter's name as it was before adapters and low-rank updates were put in."""
    return ".".join(part for part in name.split(".") if part not in ("sublayer", "base_layer"))


def find_module(block: nn.Module, name: str) -> Any:
    """The module that was called `name` before adapters were put in; None if there is none."""
    module: Any = block
    for part in name.split("."):
        module = module.sublayer if isinstance(module, AdapterThenSublayer) else module
        module = getattr(module, part, None)
    return module


def make_adapter(width: int, config: AdapterConfig, routing: Routing | None = None, part: str = "llm") -> Adapter:
    """The adapter that `config` asks for in a network, `llm` or `vision`, for states of `width` numbers.

    Raises: InputError for an unknown kind, a setting that no kind in use has, or a width its groups do not divide.
    """
    kinds = {name: adapter_kind(config, name) for name in ("llm", "vision")}
    known, defaults = kinds["llm"].settings | kinds["vision"].settings, AdapterConfig()
    for entry in fields(config):
        if entry.name not in known | NOT_OF_A_KIND and getattr(config, entry.name) != getattr(defaults, entry.name):
            named = " or ".join(f"'{name}'" for name in dict.fromkeys((config.kind, config.vision_kind or config.kind)))
            raise InputError(
                f"model.adapter.{entry.name}: found {getattr(config, entry.name)}, but an adapter of kind "
                f"{named} has no such "
                f"setting (it has {', '.join(sorted(known))}); leave it out"
            )
    return kinds[part](width, config, routing)


def is_routed(config: AdapterConfig) -> bool:
    """Whether adapters of that kind stand in the LLM and ask for the modality of a position."""
    return adapter_kind(config, "llm").routed and config.llm != "none"


def insert_adapters(
    block: nn.Module,
    number: int,
    sites: Sites,
    placement: str,
    config: AdapterConfig,
    *,
    seed: int,
    part: str,
    routing: Routing | None = None,
) -> None:
    """Puts an adapter in front of the chosen sublayers of a block, in place.

    Args:
        number: the block's, from the first.
        placement: "none", "attention", "ffn" or "both".
        seed: of the adapters' random weights.
        part: "vision" or "llm"; with the block's number and the sublayer it makes the name behind the seed.
        routing: for routed adapters of an LLM.
    """
    chosen = {"none": (), "both": ("attention", "ffn")}.get(placement, (placement,))
    for sublayer in chosen:
        with seeded(seed, f"adapter/{part}/{number}/{sublayer}"):
            adapter = make_adapter(sites.width, config, routing, part)
        place = sites.place(sublayer)
        found = getattr(block, place)
        behind_norm = sublayer in sites.norms
        setattr(
            block,
            place,
            NormThenAdapter(found, adapter) if behind_norm else AdapterThenSublayer(adapter, found),
        )


def adapter_kind(config: AdapterConfig, part: str) -> type[Adapter]:
    """The class of the adapters in a network, `llm` or `vision`. Raises InputError for an unknown name."""
    key, kind = (
        ("vision_kind", config.vision_kind)
        if part == "vision" and config.vision_kind is not None
        else ("kind", config.kind)
    )
    if kind not in ADAPTERS:
        raise InputError(f"model.adapter.{key}: found '{kind}'; {nearest(kind, ADAPTERS)}")
    return ADAPTERS[kind]
