"""What is audited: a small model as we train it, beside the same one as transformers' own classes compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.audit.pieces import Piece
from vltrain.batch import Batch
from vltrain.models.interface import VisionLanguageModel
from vltrain.schema import IGNORE_INDEX

RESERVED = 64
"""Ids at the small vocabulary's end, where the special tokens are."""


@dataclass(kw_only=True)
class Subject:
    """A model, and what it is compared with.

    kind       its model_type
    model      ours, in training mode, all of its own weights trained; `forward` takes a packed row
    reference  transformers' own class with the same weights, eager attention, in training mode without dropout
    names      name of a parameter of `model` -> its name in `reference`
    pieces     the segments that are packed
    row        segments -> a packed row
    arguments  a segment -> what the reference's forward takes for it alone, as a batch of one
    prompts    segments to answer
    decode     (prompts, steps) -> (tokens int64 [B, steps], logits [B, steps, rows of the head]) of a padded batch
    """

    kind: str
    model: VisionLanguageModel
    reference: Any
    names: Mapping[str, str]
    pieces: Sequence[Piece]
    row: Callable[[Sequence[Piece]], Batch]
    arguments: Callable[[Piece], dict[str, Any]]
    prompts: Sequence[Piece] = ()
    decode: Callable[[Sequence[Piece], int], tuple[Tensor, Tensor]] | None = None


@dataclass(kw_only=True)
class Tuning:
    """One way to tune a model.

    title    in words
    model    ours, tuned this way, in training mode
    rows     by what they are, in words: packed rows whose backward must reach all that is trained
    trained  names of the parameters that are meant to be trained
    merged   gives transformers' own network with all that was tuned in its weights, once: the model may be used up;
             None: nothing is folded
    """

    title: str
    model: VisionLanguageModel
    rows: Mapping[str, Batch]
    trained: frozenset[str]
    merged: Callable[[], Any] | None = None


@dataclass(kw_only=True)
class Outcome:
    """What a model made of segments: each one's final states [L, d] and summed loss, and the gradient of the losses'
    sum by the reference's names. `layers`: each segment's states [L, d] after each layer of the decoder."""

    states: list[Tensor]
    losses: list[float]
    gradients: dict[str, Tensor]
    layers: list[list[Tensor]] = field(default_factory=list)


def packed_outcome(subject: Subject, pieces: Sequence[Piece]) -> Outcome:
    """Of one packed row."""
    model, row = subject.model, subject.row(pieces)
    model.zero_grad(set_to_none=True)
    decoder = decoder_of(model)
    with outputs_of([*layers_of(decoder), decoder]) as made:
        output = model(row)
    output.loss_sum.backward()
    *layers, states = made
    lengths = [len(one.input_ids) for one in pieces]
    return Outcome(
        states=list(states[0].split(lengths)),
        losses=output.segment_losses.tolist(),
        gradients={subject.names[name]: one.grad for name, one in model.named_parameters() if one.grad is not None},
        layers=[list(one[0].split(lengths)) for one in layers],
    )


def reference_outcome(subject: Subject, pieces: Sequence[Piece]) -> Outcome:
    """Of each segment alone, by transformers' own classes; the loss is cross-entropy of their logits."""
    reference = subject.reference
    reference.zero_grad(set_to_none=True)
    states, losses, layers = [], [], []
    decoder = decoder_of(reference)
    for piece in pieces:
        with outputs_of([*layers_of(decoder), decoder]) as made:
            loss, value = reference_loss(reference, subject, piece)
        if piece.num_labels:
            loss.backward()
        *of_layers, last = (one[0] for one in made)
        states.append(last)
        losses.append(value)
        layers.append(of_layers)
    gradients = {name: one.grad for name, one in reference.named_parameters() if one.grad is not None}
    return Outcome(
        states=states, losses=losses, gradients=gradients, layers=[list(one) for one in zip(*layers, strict=True)]
    )


def reference_loss(reference: Any, subject: Subject, piece: Piece) -> tuple[Tensor, float]:
    """The summed loss of a segment alone, with its graph and as a number."""
    logits = reference(**subject.arguments(piece), use_cache=False).logits[0]
    labelled = piece.labels != IGNORE_INDEX
    loss = F.cross_entropy(logits[labelled].float(), piece.labels[labelled], reduction="sum")
    return loss, loss.item()


def decoder_of(network: Any) -> Any:
    """The decoder, of ours or of transformers' model."""
    network = network.llm if isinstance(network, VisionLanguageModel) else network
    return network.get_decoder() if hasattr(network, "get_decoder") else network.model


def layers_of(decoder: Any) -> list[nn.Module]:
    """The layers of a decoder; [] where it calls them otherwise."""
    for name in ("layers", "h", "blocks", "block"):
        if isinstance(layers := getattr(decoder, name, None), nn.ModuleList):
            return list(layers)
    return []


def packed_states(subject: Subject, pieces: Sequence[Piece]) -> list[Tensor]:
    """The final states [L, d] of each segment of a packed row."""
    with torch.no_grad(), outputs_of([decoder_of(subject.model)]) as made:
        subject.model(subject.row(pieces))
    return list(made[0][0].split([len(one.input_ids) for one in pieces]))


@contextmanager
def outputs_of_calls(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module gave, call by call."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, arguments, output: seen.append(output.detach()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules gave last (the first of several values), in the modules' order."""
    last: dict[int, Tensor] = {}
    seen: list[Tensor] = []

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if isinstance(first, Tensor):
                last[place] = first.detach()

        return hook

    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        yield seen
    finally:
        seen.extend(last[place] for place in sorted(last))
        for handle in handles:
            handle.remove()


@torch.no_grad()
def copy_weights(subject: Subject) -> None:
    """Gives the reference the weights of the model."""
    theirs = dict(subject.reference.named_parameters())
    for name, parameter in subject.model.named_parameters():
        theirs[subject.names[name]].copy_(parameter)
