"""What steps that are only tried leave of an engine: nothing. Its trained weights, optimizer states and DeepSpeed's
counters are kept and put back bit for bit, whatever the ZeRO stage.

Frozen weights are not copied: a step must not move them, which `vltrain.preflight` looks at. Trade-off: the copies are
in host memory, as large as a rank's share of the trained weights and of what AdamW keeps of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vltrain.train.zero.engine import Engine

PIECE = 1 << 20


class EngineSnapshot:
    """Taken between two steps; `put_back` goes between two steps, too."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._weights = {name: [(tensor, _copied(tensor)) for tensor in _tensors_of(parameter)]
                         for name, parameter in engine.trainable.items()}  # fmt: skip
        self._tensors = [pair for pairs in self._weights.values() for pair in pairs]
        self._tensors += [(tensor, _copied(tensor)) for tensor in _beside(engine)]
        self._states = {
            parameter: {name: (value, _copied(value) if isinstance(value, Tensor) else value)
                        for name, value in state.items()}
            for parameter, state in engine.optimizer.state.items()
        }  # fmt: skip
        self._without_gradient = [one for one in _leaves_of(engine) if one.grad is None]
        self._counters = [(holder, _counters_of(holder)) for holder in _holders_of(engine)]
        self._rates = [group["lr"] for group in engine.optimizer.param_groups]

    @property
    def num_bytes(self) -> int:
        """Host memory that the copies take."""
        states = [copy for state in self._states.values() for _, copy in state.values() if isinstance(copy, Tensor)]
        return sum(copy.nbytes for copy in [*(copy for _, copy in self._tensors), *states])

    @torch.no_grad()
    def still(self, name: str) -> float | None:
        """The largest entry of a trained parameter, of what this rank has of it, where it is bit for bit what it was;
        None where it has moved."""
        pairs = self._weights[name]
        if any(_apart(tensor, copy) for tensor, copy in pairs):
            return None
        return max((float(copy.abs().max()) for _, copy in pairs if copy.numel()), default=0.0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything is as it was."""
        for tensor, copy in self._tensors:
            tensor.copy_(copy)
        state = self._engine.optimizer.state
        for parameter in list(state):
            if parameter not in self._states:
                del state[parameter]
        for parameter, values in self._states.items():
            for value, copy in values.values():
                if isinstance(value, Tensor):
                    value.copy_(copy)
            state[parameter] = {name: value for name, (value, _) in values.items()}
        for leaf in _leaves_of(self._engine):
            if leaf.grad is not None:
                leaf.grad.zero_()
        for leaf in self._without_gradient:
            leaf.grad = None
        for holder, counters in self._counters:
            vars(holder).update(counters)
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


@dataclass(frozen=True)
class Generators:
    """The states of this process's random generators."""

    torch: Tensor
    device: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> Generators:
        """As they are."""
        device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), device, np.random.get_state(), random.getstate())

    def put_back(self) -> None:
        """They are as they were."""
        torch.set_rng_state(self.torch)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _leaves_of(engine: Engine) -> list[Tensor]:
    """What a gradient may hang on."""
    return list({id(one): one for one in [*engine.trainable.values(), *engine._optimizer_tensors()]}.values())


def _tensors_of(parameter: Any) -> Iterator[Tensor]:
    """Each copy that this rank keeps of a trained parameter."""
    if parameter.numel():  # nothing where ZeRO-3 has it partitioned
        yield parameter.data
    if isinstance(part := getattr(parameter, "ds_tensor", None), Tensor):
        yield part.data


def _beside(engine: Engine) -> Iterator[Tensor]:
    """The optimizer's own copies of trained weights, and the buffers that a forward may write."""
    if engine.stage:
        yield from (tensor.data for tensor in engine._optimizer_tensors())
    for buffer in engine.model.buffers():
        if buffer.is_floating_point():
            yield buffer


def _apart(tensor: Tensor, copy: Tensor) -> bool:
    """Whether any entry is another one than in the copy, which is in host memory; piece by piece, since the first
    mostly says so."""
    pieces = zip(tensor.detach().view(-1).split(PIECE), copy.view(-1).split(PIECE), strict=True)
    return any(not torch.equal(piece.cpu(), before) for piece, before in pieces)


def _holders_of(engine: Engine) -> list[Any]:
    """What counts: steps, samples, micro-steps."""
    wrapped = engine._engine
    found = [engine, wrapped, wrapped.optimizer, getattr(wrapped.optimizer, "loss_scaler", None)]
    return [one for one in found if one is not None and hasattr(one, "__dict__")]


def _counters_of(holder: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if type(value) in (bool, int, float)}
