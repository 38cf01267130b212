"""Adapters of low-rank Hadamard products (LoHa), Table 3's rows 7-9.

LoHa (FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098): W = (X1 Y1^T) o (X2 Y2^T), of rank up to r^2
from four factors of rank r. A d x d matrix W is never formed: the Hadamard product of two rank-r products is (X1 *
X2)(Y1 * Y2)^T, where * takes all r^2 products of a row's entries (the face-splitting product), so that W z costs as
much as a bottleneck of r^2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.config.model.mmt import AdapterConfig
from vltrain.models.adapters.base import Adapter, require_divisible
from vltrain.models.adapters.routing import Router, Routing
from vltrain.ops.adapter import face_split, grouped_matrix, routed_adapter


class LohaMatrix(nn.Module):
    """W [out, in] = (X1 Y1^T) o (X2 Y2^T). Parameters: 2 r (out + in).

    Its factors start normal, so that W's entries have the deviation of Xavier's, or X2 = 0 and with it W.
    """

    def __init__(self, out: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.out, self.inputs, self.rank = out, inputs, rank
        self.x1, self.x2 = (nn.Parameter(torch.empty(out, rank)) for _ in range(2))
        self.y1, self.y2 = (nn.Parameter(torch.empty(inputs, rank)) for _ in range(2))

    def reset_parameters(self, zero: bool) -> None:
        # An entry of W is a product of two sums of r products each: its deviation is r times the factors' to the
        # fourth.
        out, inputs, rank = self.out, self.inputs, self.rank
        xavier = (2 / (out + inputs)) ** 0.5
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=(xavier / rank) ** 0.25)
        if zero:
            nn.init.zeros_(self.x2)

    def matrix(self) -> Tensor:
        """W itself [out, in]; for small ones."""
        return (self.x1 @ self.y1.t()) * (self.x2 @ self.y2.t())

    def factors(self) -> tuple[Tensor, Tensor]:
        """(U [out, r^2], V [in, r^2]) with W = U V^T."""
        return face_split(self.x1, self.x2), face_split(self.y1, self.y2)

    @property
    def products_per_row(self) -> int:
        """Multiplications of W z through the factors."""
        return self.rank**2 * (self.out + self.inputs)


class LohaAdapter(Adapter):
    """Row 7, Eq. 6: g(Z) = Z + s (w_1 (W_1 Z + b_1) + w_2 (W_2 Z + b_2)), two d x d LoHa maps under LaVIN's routing
    weights.

    There is no down projection; `rank` is LoHa's r. Eq. 6 leaves out the residual; without it the pretrained network's
    function would be lost at the first step. Parameters: 8 r d + 2 d + 2 d + 2.
    """

    settings = frozenset({"bias", "rank", "scale", "temperature"})
    routed = True

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__(width, config)
        self.experts = nn.ModuleList(LohaMatrix(width, width, config.rank) for _ in range(2))
        self.bias = self.bias_parameter(2, width)
        self.router = Router(width, 2, config.temperature, routing, config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for expert in self.experts:
            expert.reset_parameters(zero=True)
        self.zero(self.bias)
        self.router.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """`z` [..., L, d] -> [..., L, d]."""
        weights = self.router(z).to(z.dtype)
        result = z if self.bias is None else z + self.scale * (weights @ self.bias)
        for expert, weight in zip(self.experts, weights.unbind(-1), strict=True):
            up, down = expert.factors()
            result = result + self.scale * F.linear(weight[..., None] * F.linear(z, down.t()), up)
        return result

    def flops_per_row(self, input_needs_grad: bool) -> float:
        half = sum(expert.products_per_row for expert in self.experts) / 2  # W is square: half is V's, half U's
        return 2.0 * (half * (2 + input_needs_grad) + half * 3)


class LohaRouterAdapter(Adapter):
    """Row 8: LaVIN's router adapter whose three projections are LoHa matrices. g as in `RouterAdapter`, W_A, W_B, W_D
    each (X1 Y1^T) o (X2 Y2^T); the grouped ones of shape d x h / k.

    Parameters: 2 r (h + d) + h + 2 (2 r (d + h / k) + d) + 2 d + 2.
    """

    settings = frozenset({"bias", "dim", "groups", "dropout", "rank", "scale", "temperature"})
    routed = True

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__(width, config)
        self.groups = require_divisible(width, config, "groups")
        self.down = LohaMatrix(self.dim, width, config.rank)
        self.down_bias = self.bias_parameter(self.dim)
        self.ups = nn.ModuleList(LohaMatrix(width, self.dim // self.groups, config.rank) for _ in range(2))
        self.up_bias = self.bias_parameter(2, width)
        self.router = Router(width, 2, config.temperature, routing, config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.down.reset_parameters(zero=False)
        for expert in self.ups:
            expert.reset_parameters(zero=True)
        self.zero(self.down_bias, self.up_bias)
        self.router.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """`z` [..., L, d] -> [..., L, d]."""
        matrices = torch.stack([grouped_matrix(expert.matrix().unflatten(0, (self.groups, -1))) for expert in self.ups])
        down = (self.down.matrix(), self.down_bias)
        return routed_adapter(
            z, self.router(z), *down, matrices, self.up_bias, scale=self.scale, dropout=self.active_dropout
        )

    def flops_per_row(self, input_needs_grad: bool) -> float:
        up = 2 * self.width * self.dim // self.groups
        return 2.0 * (self.width * self.dim * (2 + input_needs_grad) + up * 3)


class LohaSiluAdapter(Adapter):
    """Row 9, Eq. 7: g(Z) = phi_1(SiLU(phi_2(Z))) + Z, phi_i(Z) = W_i Z + b_i with d x d LoHa matrices, and no routing.

    phi_1 starts at zero, phi_2 does not. Not linear: it cannot be merged. Parameters: 8 r d + 2 d.
    """

    settings = frozenset({"bias", "rank"})

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__(width, config)
        self.outer, self.inner = LohaMatrix(width, width, config.rank), LohaMatrix(width, width, config.rank)
        self.outer_bias, self.inner_bias = (self.bias_parameter(width) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.inner.reset_parameters(zero=False)
        self.outer.reset_parameters(zero=True)
        self.zero(self.outer_bias, self.inner_bias)

    def forward(self, z: Tensor) -> Tensor:
        """`z` [..., d] -> [..., d]."""
        (outer_up, outer_down), (inner_up, inner_down) = self.outer.factors(), self.inner.factors()
        inner = F.silu(F.linear(F.linear(z, inner_down.t()), inner_up, self.inner_bias))
        return F.linear(F.linear(inner, outer_down.t()), outer_up, self.outer_bias) + z

    def flops_per_row(self, input_needs_grad: bool) -> float:
        half = self.inner.products_per_row / 2
        return 2.0 * (half * (2 + input_needs_grad) + 3 * half * 3)
