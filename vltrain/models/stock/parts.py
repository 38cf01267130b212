"""What a vision-language model of transformers consists of, found by its interface: tower, projector, decoder, head;
and the units that it is loaded in.

transformers names the decoder `language_model` or `text_model` and the tower one of `TOWERS` in all families
(`get_decoder`, `get_encoder`); everything else is the projector, and so is what a tower keeps of it (Qwen-VL's
`merger`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vltrain.models.peft.lora import is_peft_parameter

TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
DECODERS = ("language_model", "text_model", "lm_head")
_PROJECTORS = re.compile(r"merger|project(or|ion)|connector|perceiver|downsample")  # children of a tower


@dataclass(frozen=True)
class Parts:
    """core     the model without its head, which takes images that were encoded before
    tower, decoder  its parts; head: makes logits of the decoder's states
    tower_blocks, decoder_blocks  the transformer blocks, first to last; a convolutional tower has none
    """

    core: Any
    tower: Any
    decoder: Any
    head: nn.Linear
    tower_blocks: tuple[nn.Module, ...]
    decoder_blocks: tuple[nn.Module, ...]


def parts_of(network: PreTrainedModel) -> Parts:
    """The parts of a network that `vltrain.models.stock.source` accepts."""
    core: Any = network.base_model
    tower, decoder = network.get_encoder("image"), network.get_decoder()
    head = network.get_output_embeddings()
    assert isinstance(head, nn.Linear), f"a head of {type(head).__name__}"
    return Parts(core, tower, decoder, head, tuple(_blocks(tower)), tuple(_blocks(decoder)))


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The items of the module list with most parameters that is in no other one, and no projector's."""
    lists: list[nn.ModuleList] = []

    def find(module: nn.Module) -> None:
        for name, child in module.named_children():
            if _PROJECTORS.search(name):
                continue
            if isinstance(child, nn.ModuleList):
                lists.append(child)
            else:
                find(child)

    find(network)
    largest = max(lists, key=lambda one: sum(parameter.numel() for parameter in one.parameters()), default=())
    return list(largest)


def part_of(name: str) -> str:
    """The part (`StockModel.PARTS`) that a parameter of that full name belongs to."""
    if ".adapter." in name:
        return "adapter"
    if is_peft_parameter(name):
        return "peft"
    words = name.split(".")
    for place, word in enumerate(words):
        if word in DECODERS:
            return "llm"
        if word in TOWERS:
            return "projector" if any(map(_PROJECTORS.search, words[place + 1 : place + 2])) else "vision"
    return "projector"


def units(network: PreTrainedModel, parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what is loaded at once, in the order of the modules: blocks, and the largest modules around
    them that hold none; together all parameters but those of `holders`."""
    blocks = {*parts.tower_blocks, *parts.decoder_blocks}

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in blocks or blocks.isdisjoint(module.modules()):
            if next(module.parameters(), None) is not None:
                yield name, module
            return
        for inner, child in module.named_children():
            yield from walk(f"{name}.{inner}" if name else inner, child)

    yield from walk("", network)


def holders(network: PreTrainedModel, parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what holds units and parameters of its own beside them (LLaVA-NeXT's `image_newline`)."""
    blocks = {*parts.tower_blocks, *parts.decoder_blocks}
    for name, module in network.named_modules():
        is_block = module in blocks
        own = next(module.parameters(recurse=False), None)
        if own is not None and not is_block and not blocks.isdisjoint(module.modules()):
            yield name, module


class Ties:
    """Parameters with several names, which share a weight: `renew` makes them share it again when the first one was
    given another."""

    def __init__(self, network: PreTrainedModel) -> None:
        self._network = network
        by_weight: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            by_weight.setdefault(id(parameter), []).append(name)
        self.names = {first: others for first, *others in by_weight.values() if others}

    def renew(self) -> None:
        for first, others in self.names.items():
            weight = self._network.get_parameter(first)
            for name in others:
                parent, _, leaf = name.rpartition(".")
                setattr(self._network.get_submodule(parent), leaf, weight)
