"""What goes through an LLM in a forward, ours or transformers': positions, embeddings, and the states behind each
layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vltrain.schema import Segment


@dataclass(frozen=True)
class Stack:
    """Transformer blocks, and the module that holds them. reads: which of a segment's tokens; "all": packed in one row,
    else in padded rows."""

    layers: list[nn.Module]
    whole: nn.Module
    reads: Literal["all", "prompt", "answer"] = "all"


@dataclass
class Trace:
    """Of one forward. outputs: by stack, the states behind each layer and, last, of the whole."""

    stacks: list[Stack]
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    positions: Tensor | None = None


def stacks_of(llm: Any) -> list[Stack]:
    """Of an LLM of transformers, or of an architecture's view of one."""
    if isinstance(getattr(llm, "encoder", None), nn.Module) and hasattr(llm, "decoder"):
        return [
            Stack(list(llm.encoder.block), llm.encoder, "prompt"), Stack(list(llm.decoder.block), llm.decoder, "answer")
        ]  # fmt: skip
    decoder = llm.get_decoder() if hasattr(llm, "get_decoder") else llm.model
    names = ("layers", "h", "blocks", "block")
    layers = next((found for name in names if isinstance(found := getattr(decoder, name, None), nn.ModuleList)), ())
    return [Stack(list(layers), decoder)]


@contextmanager
def traced(llm: Any, *, layers: bool = True) -> Iterator[Trace]:
    """Keeps what goes through, of the last call of each module. `layers`: of each layer, too."""
    trace = Trace(stacks_of(llm))
    handles = []

    def keep(place: tuple[int, int]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if isinstance(first, Tensor):
                trace.outputs[place] = first.detach()

        return hook

    def embedded(module: nn.Module, arguments: Any, named: Any) -> None:
        if isinstance(found := named.get("inputs_embeds"), Tensor):
            trace.embeds = found.detach()

    def placed(module: nn.Module, arguments: Any, named: Any) -> None:
        found = named.get("position_ids", arguments[1] if len(arguments) > 1 else None)
        if isinstance(found, Tensor):
            trace.positions = found.detach()

    for number, stack in enumerate(trace.stacks):
        for layer, module in enumerate([*stack.layers, stack.whole]):
            if layers or module is stack.whole:
                handles.append(module.register_forward_hook(keep((number, layer))))
    first = trace.stacks[0].whole
    handles.append(first.register_forward_pre_hook(embedded, with_kwargs=True))
    if isinstance(rotary := getattr(first, "rotary_emb", None), nn.Module):
        handles.append(rotary.register_forward_pre_hook(placed, with_kwargs=True))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def by_segment(states: Tensor, reads: str, segments: Sequence[Segment], num_apart: int = 0) -> list[Tensor]:
    """States [1, T, d] of a packed row, or [S, L, d] of padded rows, cut: [L, d] of each segment, without its first
    `num_apart` tokens."""
    whole = [len(one.input_ids) for one in segments]
    if reads == "all":
        return [one[num_apart:] for one in states[0].split(whole)]
    answers = [int(one.loss_mask.sum()) for one in segments]
    lengths = answers if reads == "answer" else [all_ - some for all_, some in zip(whole, answers, strict=True)]
    return [row[:length] for row, length in zip(states, lengths, strict=True)]


def final_states(trace: Trace, segments: Sequence[Segment], num_apart: int = 0) -> list[Tensor]:
    """What the stacks give for each segment, one after another, [L, d]."""
    found = [
        by_segment(trace.outputs[number, len(stack.layers)], stack.reads, segments, num_apart)
        for number, stack in enumerate(trace.stacks)
    ]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
