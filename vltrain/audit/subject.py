"""What is audited: a small model as we train it, beside the same one as transformers' own classes compute it.

Ours is what `Architecture.build` makes of a section, its rows what the loader makes of segments. Beside it stands a
`Reference`: transformers' networks, untouched, with the same weights; of what was put into ours, adapters are called by
hooks, and peft's layers are peft's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.audit.small.weights import disturb
from vltrain.batch import Batch
from vltrain.data.loader import batch_of, filler
from vltrain.data.pictures import Pictures
from vltrain.models.adapters.routing import Routing
from vltrain.models.adapters.table import AdapterThenSublayer, NormThenAdapter
from vltrain.models.interface import VisionLanguageModel
from vltrain.models.peft.layers import has_adalora, has_lora, has_prompts
from vltrain.models.quantise import FrozenLinear
from vltrain.schema import Segment


class Reference(nn.Module, ABC):
    """transformers' own classes, eager attention, in training mode without dropout.

    num_apart  tokens at a segment's beginning that are no part of its sequence here
    routing    of routed adapters that were put in
    """

    num_apart = 0
    routing: Routing | None = None
    llm: Any

    @property
    def reads_ids(self) -> Any:
        """The one network of transformers', with its head, where that reads token ids by itself; None: there is
        none."""
        return None

    @abstractmethod
    def predictions(self, segment: Segment) -> Tensor:
        """Logits [A, rows of the head] of the A tokens of a segment that are to be predicted, the segment alone."""


@dataclass(kw_only=True)
class Made:
    """What an architecture's file here gives.

    kind       what it is, in words
    model      ours, as built
    reference  with weights of its own still
    roots      modules of ours, and the reference's that compute the same
    folded     gives a reference of the model's weights with all that was tuned folded in, saved and loaded by
               transformers; the model may be used up. Raises InputError for what cannot be folded
    """

    kind: str
    model: VisionLanguageModel
    reference: Reference
    roots: Sequence[tuple[nn.Module, nn.Module]]
    segments: Sequence[Segment]
    pictures: Pictures
    folded: Callable[[], Reference]


@dataclass(kw_only=True)
class Subject(Made):
    """title    how it is tuned, in words; "": there is nothing to tell it from
    trained  names of the parameters that are meant to be trained
    paired   by name of a trained parameter: the reference's
    added    those that are no network's own
    """

    title: str
    trained: frozenset[str]
    paired: Mapping[str, nn.Parameter] = field(default_factory=dict)
    added: frozenset[str] = frozenset()

    def row(self, segments: Sequence[Segment], *, blank: bool = False) -> Batch:
        """A packed row, made by the loader. `blank`: see `vltrain.data.loader.batch_of`."""
        shown = {name: self.pictures.load(name) for one in segments for name in one.images}
        return batch_of(segments, shown, self.pictures.reader, blank)

    def rows(self) -> dict[str, Batch]:
        """By what they are, in words: rows whose backward must reach all that is trained."""
        text = [one for one in self.segments if not one.images]
        if len(text) == len(self.segments):
            return {"a row of text": self.row(text)}
        return {
            "a row with images": self.row(self.segments),
            "a row of text, with an image for other ranks' sake": self.row(text, blank=True),
            "a filler": filler(True, self.pictures.reader),
        }


@torch.no_grad()
def make_subject(made: Made, title: str, trained_parts: set[str]) -> Subject:
    """Gives both the same random weights, of which every mechanism matters, and the reference what is put into ours."""
    model, reference = made.model, made.reference
    head = model.llm.lm_head
    disturb(model, head)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = frozenset(
        name for name in names.values() if model.part_of(name) in trained_parts and ".ranknum." not in name
    )
    pairing = _Pairing(names, model.routing, reference)
    for ours, theirs in made.roots:
        pairing.pair(ours, theirs)
    pairing.put_in()
    reference.requires_grad_(False)
    for name, parameter in pairing.found.items():
        parameter.requires_grad_(name in trained)
    lost = trained - pairing.found.keys()
    assert not lost, f"parameters that the reference lacks: {sorted(lost)[:4]}"
    values = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return Subject(**values, title=title, trained=trained, paired=pairing.found, added=frozenset(pairing.added))


class _Pairing:
    """Walks two networks side by side. found: by name of a parameter of ours, the reference's."""

    def __init__(self, names: Mapping[int, str], routing: Routing | None, reference: Reference) -> None:
        self.names, self.routing, self.reference = names, routing, reference
        self.found: dict[str, nn.Parameter] = {}
        self.added: set[str] = set()
        self.later: list[Callable[[], None]] = []
        if routing is not None:
            reference.routing = Routing()

    def pair(self, given: Any, theirs: Any, parent: Any = None, name: str = "") -> None:
        """Copies weights, and notes what is to be put in once all have theirs."""
        ours: Any = given
        if isinstance(ours, NormThenAdapter):
            self.later.append(partial(self._behind, given.adapter, theirs))
            ours = ours.norm
        elif isinstance(ours, AdapterThenSublayer):
            self.later.append(partial(self._before, ours.adapter, theirs))
            self.pair(ours.sublayer, theirs, parent, name)
            return
        if has_lora(ours) or has_adalora(ours) or has_prompts(ours):
            inner = ours.model if has_prompts(ours) else ours.get_base_layer()
            self.later.insert(0, partial(self._around, ours, inner, theirs, parent, name))
            ours = inner
        if isinstance(ours, FrozenLinear):  # packed: the reference has the weights that these stand for
            theirs.weight.copy_(ours.dequantised(torch.float32))
            if ours.bias is not None:
                theirs.bias.copy_(ours.bias)
            return
        for own, parameter in ours.named_parameters(recurse=False):
            counterpart = getattr(theirs, own)
            counterpart.copy_(parameter)
            self.found[self.names[id(parameter)]] = counterpart
        for child, module in ours.named_children():
            self.pair(module, getattr(theirs, child), theirs, child)

    def put_in(self) -> None:
        """Adapters and updates."""
        for put in self.later:
            put()

    def _copied(self, module: nn.Module, shared: dict[int, Any]) -> Any:
        if self.routing is not None:
            shared[id(self.routing)] = self.reference.routing
        kept = {id(one) for value in shared.values() if isinstance(value, nn.Module) for one in value.parameters()}
        copied = copy.deepcopy(module, dict(shared))
        theirs = dict(copied.named_parameters())
        for name, parameter in module.named_parameters():
            if (counterpart := theirs.get(name)) is not None and id(counterpart) not in kept:
                self.found[self.names[id(parameter)]] = counterpart
                self.added.add(self.names[id(parameter)])
        return copied

    def _around(self, ours: nn.Module, inner: nn.Module, theirs: nn.Module, parent: Any, name: str) -> None:
        setattr(parent, name, self._copied(ours, {id(inner): theirs}))

    def _behind(self, adapter: nn.Module, norm: nn.Module) -> None:
        copied = self._copied(adapter, {})
        norm.register_forward_hook(lambda module, given, output: copied(output))

    def _before(self, adapter: nn.Module, sublayer: nn.Module) -> None:
        copied = self._copied(adapter, {})

        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if given:
                return (copied(given[0]), *given[1:]), named
            return given, {**named, "hidden_states": copied(named["hidden_states"])}

        sublayer.register_forward_pre_hook(hook, with_kwargs=True)


def reloaded(network_class: type[PreTrainedModel], config: Any, weights: Mapping[str, Tensor], folder: str) -> Any:
    """A network of transformers with those weights, saved in a folder and loaded by transformers alone."""
    network: Any = network_class._from_config(copy.deepcopy(config), attn_implementation="eager")
    network.load_state_dict(weights, strict=False)
    network.save_pretrained(folder)
    again: Any = network_class
    return again.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
