"""Which modality a position is routed by.

LaVIN's mixture of modality adapters (Luo et al. 2023, https://arxiv.org/abs/2305.15023) weighs its experts by the
hidden state of a decision token: the modality embedding u_m in front of a sample, which no other token may attend to.
So u_m is a sequence of its own, of one token, and its states depend on the modality and the weights alone. Two uses
follow, both exact:

packed    in a packed row each segment's u_m becomes a segment of its own, and its state at a layer routes the rest of
          its segment;
decided   for generation the two possible u_m run through the LLM once; what each router then says is kept by modality.

A block calls its norm with the states and nothing else, so what a router must know besides reaches it through the one
`Routing` that all routers of an LLM share. The price is a state that outlives a call; recomputed blocks get the one of
their own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Packed:
    """starts int64 [S]: where each segment's decision token stands; owner int64 [T]: the segment of each position."""

    starts: Tensor
    owner: Tensor


@dataclass(frozen=True)
class _Deciding:
    """The two decision tokens run as a batch [2, 1, d], text first; routers keep what they say."""


@dataclass(frozen=True)
class _Decided:
    """modality int64 [B]: 0 text, 1 image, of each row of a batch [B, L, d]."""

    modality: Tensor


class Routing:
    """Shared by the routers of one LLM: how the states that come next are to be routed."""

    def __init__(self) -> None:
        self.mode: _Packed | _Deciding | _Decided | None = None
        self.decisions: dict[nn.Module, Tensor] = {}

    def packed(self, starts: Tensor, owner: Tensor) -> AbstractContextManager[None]:
        """States are one packed row [1, T, d]. `starts` int64 [S], `owner` int64 [T], both on its device."""
        return self._during(_Packed(starts, owner))

    def deciding(self) -> AbstractContextManager[None]:
        """States are those of the two decision tokens [2, 1, d]; forgets what was decided before."""
        self.decisions.clear()
        return self._during(_Deciding())

    def decided(self, modality: Tensor) -> AbstractContextManager[None]:
        """States are a batch [B, L, d] without decision tokens. `modality` int64 [B]: 0 text, 1 image."""
        return self._during(_Decided(modality))

    def for_checkpoint(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """torch's `context_fn`: a block that is recomputed sees the routing of its first run."""
        return nullcontext(), self._during(self.mode)

    @contextmanager
    def _during(self, mode: _Packed | _Deciding | _Decided | None) -> Iterator[None]:
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


class Router(nn.Module):
    """w = softmax(Linear(d, n)(x) / t), of the decision token's state x, or of each token's own.

    Without a `Routing` (in the ViT, which has no decision token) every token is routed by its own state. LaVIN's public
    code reads batch item 0 there, which routes an image by its neighbour in the batch; with a batch of one it is the
    same. `bias`: the linear's.
    The linear starts as torch's own do, small: at zero, experts that start alike would get the same gradient for ever.
    """

    def __init__(
        self, width: int, num_weights: int, temperature: float, routing: Routing | None, bias: bool = True
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_weights, bias=bias)
        self.temperature = temperature
        self.routing = routing

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, states: Tensor) -> Tensor:
        """[..., L, d] -> weights that broadcast against [..., L, n]; fp32 at least."""
        if self.routing is None:
            return self._weigh(states)
        mode = self.routing.mode
        if isinstance(mode, _Packed):
            return self._weigh(states[0, mode.starts])[mode.owner][None]
        if isinstance(mode, _Deciding):
            self.routing.decisions[self] = self._weigh(states)
            return self.routing.decisions[self]
        assert isinstance(mode, _Decided), "a routed adapter was called with no routing set"
        return self.routing.decisions[self][mode.modality]

    def _weigh(self, states: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        return (self.linear(states).to(wide) / self.temperature).softmax(-1)
