"""Routed adapters: experts weighed by what the modality's decision token says (Table 3, rows 1-6 and 11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vltrain.config.model.mmt import AdapterConfig
from vltrain.models.adapters.base import Adapter, require_divisible
from vltrain.models.adapters.routing import Router, Routing
from vltrain.models.quantise import num_weights
from vltrain.ops.adapter import grouped_matrix, routed_adapter


class RouterAdapter(Adapter):
    """LaVIN's mixture-of-modality adapter, rows 1-4: g(Z) = Z + s (w_0 B(z) + w_1 D(z)), z = A(Z), w = softmax(R(x) /
    t).

    A: Linear d -> h, dense; B and D: Linear h -> d in `groups` groups; R: Linear d -> 2; x: see `Router`.
    Parameters: d h + h + 2 (h d / k + d) + 2 d + 2; without `bias` h + 2 d + 2 fewer. B and D start at zero, so g
    starts as the identity.
    """

    settings = frozenset({"bias", "dim", "groups", "dropout", "scale", "temperature"})
    routed = True
    num_experts = 2
    num_weights = 2

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__(width, config)
        self.groups, out = self._expert_shape(width, config)
        self.down_weight = nn.Parameter(torch.empty(self.dim, width))
        self.down_bias = self.bias_parameter(self.dim)
        self.up_weight = nn.Parameter(
            torch.empty(self.num_experts, self.groups, out // self.groups, self.dim // self.groups)
        )
        self.up_bias = self.bias_parameter(self.num_experts, out)
        self.router = Router(width, self.num_weights, config.temperature, routing, config.bias)
        self.reset_parameters()

    def _expert_shape(self, width: int, config: AdapterConfig) -> tuple[int, int]:
        """(groups, outputs) of each expert."""
        return require_divisible(width, config, "groups"), width

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down_weight)
        self.zero(self.down_bias, self.up_weight, self.up_bias)
        self.router.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """`z` [..., L, d] -> [..., L, d]."""
        weights = self.router(z)[..., : self.num_experts]
        matrices = torch.stack([grouped_matrix(expert) for expert in self.up_weight])
        down = (self.down_weight, self.down_bias)
        return routed_adapter(
            z, weights, *down, *self._place(matrices, self.up_bias), scale=self.scale, dropout=self.active_dropout
        )

    def _place(self, matrices: Tensor, biases: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The experts' matrices [E, out, h] and biases [E, out] as maps to all of the d outputs."""
        return matrices, biases

    def flops_per_row(self, input_needs_grad: bool) -> float:
        per_token_routing = num_weights(self.router.linear.weight) if self.router.routing is None else 0
        return 2.0 * (
            (num_weights(self.down_weight) + per_token_routing) * (2 + input_needs_grad)
            + num_weights(self.up_weight) * 3
        )

    def extra_repr(self) -> str:
        return (
            f"{self.width}, dim={self.dim}, groups={self.groups}, temperature={self.router.temperature}, "
            f"scale={self.scale}"
        )


class ConcatRouterAdapter(RouterAdapter):
    """Rows 5-6, "[psi_1(Z), psi_2(Z)]": the experts' outputs side by side instead of summed.

    g(Z) = Z + s [w_0 B(z), w_1 D(z)], B and D: Linear h -> d / 2 in `groups` groups. The paper gives no more than the
    brackets; that both share A and keep LaVIN's weights is our reading. Parameters: d h + h + h d / k + d + 2 d + 2.
    """

    def _expert_shape(self, width: int, config: AdapterConfig) -> tuple[int, int]:
        return require_divisible(width, config, "groups", parts=2), width // 2

    def _place(self, matrices: Tensor, biases: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first, second = matrices
        zeros = torch.zeros_like(first)
        placed = torch.stack([torch.cat([first, zeros]), torch.cat([zeros, second])])
        if biases is None:
            return placed, None
        no_bias = torch.zeros_like(biases[0])
        return placed, torch.stack([torch.cat([biases[0], no_bias]), torch.cat([no_bias, biases[1]])])


class WeightedBottleneckAdapter(RouterAdapter):
    """Row 11, "bottleneck with weight scales": the Bottleneck Adapter under a dynamic weight, g(Z) = Z + s w_0
    psi_u(psi_d(Z)).

    w = softmax(R(x) / t) as LaVIN's, of which the one expert takes the first; the second is the weight of leaving Z as
    it is.
    The paper says no more than "dynamic weight factors"; this is our reading. Parameters: d h + h + h d / k + d + 2 d +
    2.
    """

    num_experts = 1
