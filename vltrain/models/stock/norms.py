"""Which norm of a block stands right before a sublayer: found by running the network on tensors without numbers.

Names do not tell (`post_attention_layernorm` is in front of LLaMA's MLP, and behind Gemma's attention), nor does the
order of a block's children. So tower and decoder are run, and each norm's result is followed: it must be the very
tensor that the sublayer gets, and nothing else may read it, as it does in blocks whose sublayers stand side by side or
whose residual is taken behind the norm.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.models.stock.parts import parts_of
from vltrain.models.stock.reach import MISFITS, reach_of
from vltrain.models.stock.source import network_class
from vltrain.models.without_numbers import Answers, take_numbers

Norms = Mapping[str, str]
"""Of a block: by a child's name that of the norm right before it."""
ROWS = 8  # of the states that the decoder is run on
_SHAPE = ("size", "dim", "__len__")  # what only asks how large a tensor is


def norms_before(config: PreTrainedConfig) -> dict[str, tuple[Norms, ...]]:
    """Of networks of that config, by part (`vision`, `llm`): of each block, in order. A part that cannot be run alone
    has none."""
    key = f"{type(config).__name__} {json.dumps(config.to_dict(), sort_keys=True, default=str)}"
    if key not in _FOUND:
        _FOUND[key] = _explore(copy.deepcopy(config))
    return _FOUND[key]


_FOUND: dict[str, dict[str, tuple[Norms, ...]]] = {}


@torch.no_grad()
def _explore(config: PreTrainedConfig) -> dict[str, tuple[Norms, ...]]:
    without_numbers = FakeTensorMode(allow_non_fake_inputs=True)
    images = reach_of(config).tensors
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        with torch.device("meta"):
            network = network_class(config)._from_config(config)
        take_numbers(network, without_numbers, lambda parameter: torch.float32)
        parts = parts_of(network)
        with without_numbers:
            given = {name: torch.empty(one.shape) if one.is_meta else one for name, one in images.items()}
            states = torch.empty(1, ROWS, parts.decoder.get_input_embeddings().weight.shape[1])
        runs: dict[str, tuple[tuple[nn.Module, ...], Any]] = {
            "vision": (parts.tower_blocks, lambda: parts.core.get_image_features(**given, return_dict=True)),
            "llm": (parts.decoder_blocks, lambda: parts.decoder(inputs_embeds=states, use_cache=False)),
        }
        found: dict[str, tuple[Norms, ...]] = {}
        for part, (blocks, run) in runs.items():
            follower = _Follower(blocks)
            try:
                with Answers(), follower:
                    run()
            except MISFITS:  # what a family's code runs into without numbers
                found[part] = tuple({} for _ in blocks)
            else:
                found[part] = follower.found()
        return found


class _Follower(TorchFunctionMode):
    """A context that follows what the children of blocks give to each other."""

    def __init__(self, blocks: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self._blocks = blocks
        self._made: dict[int, tuple[int, str, Tensor]] = {}  # by a result's id: block, child, and the result, kept
        self._read: dict[tuple[int, str], set[str]] = {}  # by (block, child): who reads its result; "": something else
        self._inside = 0
        for number, block in enumerate(blocks):
            for name, child in block.named_children():
                child.register_forward_pre_hook(self._entering(number, name), with_kwargs=True)
                child.register_forward_hook(self._leaving(number, name))

    def found(self) -> tuple[Norms, ...]:
        """Of each block: who alone reads what a child of one parameter a channel gives, by the reader."""
        result: list[dict[str, str]] = [{} for _ in self._blocks]
        for (number, name), readers in self._read.items():
            [reader, *others] = readers
            if reader and not others:
                result[number][reader] = name
        return tuple(result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        asks_shape = name in _SHAPE or (name == "__get__" and not isinstance(output, Tensor))
        if not self._inside and not asks_shape:
            self._note((args, kwargs or {}), "")
        return output

    def _entering(self, number: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            states = args[0] if args else kwargs.get("hidden_states")
            others = (args[1:], {key: value for key, value in kwargs.items() if value is not states})
            self._note(states, f"{number}.{name}" if not self._inside else "")
            self._note(others, "")
            self._inside += 1

        return hook

    def _leaving(self, number: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            if isinstance(output, Tensor) and not self._inside:
                self._made[id(output)] = (number, name, output)

        return hook

    def _note(self, given: Any, reader: str) -> None:
        for one in _tensors(given):
            made = self._made.get(id(one))
            if made is not None:
                number, name, _ = made
                same_block = reader.startswith(f"{number}.")
                self._read.setdefault((number, name), set()).add(reader.partition(".")[2] if same_block else "")


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        return [tensor for one in given.values() for tensor in _tensors(one)]
    return [tensor for one in given for tensor in _tensors(one)] if isinstance(given, (tuple, list)) else []
