"""The paper's own adapter, and the one it comes from."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.config.model.mmt import AdapterConfig
from vltrain.errors import InputError
from vltrain.models.adapters.base import Adapter, require_divisible
from vltrain.models.adapters.norms import normalised
from vltrain.models.adapters.routing import Routing
from vltrain.models.quantise import num_weights
from vltrain.ops.adapter import bottleneck_adapter, grouped_matrix
from vltrain.ops.fused import fused_adapter, may_run_fused, require_fused, runs_fused


class BottleneckAdapter(Adapter):
    """The paper's Bottleneck Adapter, Eq. 1-2: g(Z) = Z + psi_u(psi_d(Z)), with no non-linearity.

    psi_d: Linear d -> h in `down_groups` groups (1: dense, as in Eq. 2); psi_u: Linear h -> d in `groups` groups. Each
    of k groups maps its own 1/k of the inputs to its own 1/k of the outputs. Parameters: d h / k_d + h + h d / k_u + d;
    without `bias` h + d fewer.
    Only the down weight starts non-zero (Xavier-uniform per group), so g starts as the identity.
    """

    settings = frozenset({"bias", "dim", "groups", "down_groups", "dropout", "impl"})
    takes_norm = True

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__(width, config)
        self.impl = config.impl
        if self.impl == "triton" and torch.get_default_device().type != "meta":  # an outline runs nowhere
            require_fused(self.dim, self.dropout)
        k_up, k_down = require_divisible(width, config, "groups"), require_divisible(width, config, "down_groups")
        self.groups, self.down_groups = k_up, k_down
        self.down_weight = nn.Parameter(torch.empty(k_down, self.dim // k_down, width // k_down))
        self.down_bias = self.bias_parameter(self.dim)
        self.up_weight = nn.Parameter(torch.empty(k_up, width // k_up, self.dim // k_up))
        self.up_bias = self.bias_parameter(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for group in self.down_weight:
            nn.init.xavier_uniform_(group)
        self.zero(self.down_bias, self.up_weight, self.up_bias)

    def may_fuse(self) -> bool:
        return may_run_fused(self.impl, self.dim, self.dropout)

    def forward(self, z: Tensor, norm: nn.Module | None = None) -> Tensor:
        """`z` [..., d] -> [..., d]: g(z), or g(norm(z)), in one kernel where that can be."""
        fused = runs_fused(self.impl, z, self.dim, self.dropout)
        if norm is not None:
            form = self.norm_form
            # A weight that ZeRO-3 has partitioned and not gathered is empty, see `NormThenAdapter`.
            if fused and form is not None and cast(Tensor, norm.weight).numel() > 0:
                return fused_adapter(
                    z, *self._dense(), scale=self.scale, norm_weight=form.weight_of(norm), eps=form.eps
                )
            z = normalised(norm, z)
        if fused:
            return fused_adapter(z, *self._dense(), scale=self.scale)
        weights = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return bottleneck_adapter(z, *weights, scale=self.scale, dropout=self.active_dropout)

    def _dense(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return grouped_matrix(self.down_weight), self.down_bias, grouped_matrix(self.up_weight), self.up_bias

    def flops_per_row(self, input_needs_grad: bool) -> float:
        return 2.0 * (num_weights(self.down_weight) * (2 + input_needs_grad) + num_weights(self.up_weight) * 3)

    @torch.no_grad()
    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        """(M [d, d], b [d]) in float64 with g(z) = M z + b, for merging: a linear layer (W, c) that reads g becomes
        (W M, W b + c). b is None in an adapter without biases."""
        down, up, offset = self._wide_factors()
        return torch.eye(self.width, dtype=torch.float64, device=up.device) + self.scale * (up @ down), offset

    @torch.no_grad()
    def low_rank_map(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(D [h, d], s U [d, h], b [d]) in float64 with g(z) = z + s U D z + b; b is None in an adapter without biases.

        Raises: InputError if g hands on nothing of z, so that what it adds has the rank d.
        """
        down, up, offset = self._wide_factors()
        return down, self.scale * up, offset

    def _wide_factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        down, up = (grouped_matrix(weight.double()) for weight in (self.down_weight, self.up_weight))
        if self.up_bias is None:
            return down, up, None
        return down, up, self.scale * (up @ self.down_bias.double() + self.up_bias.double())

    def extra_repr(self) -> str:
        return (
            f"{self.width}, dim={self.dim}, groups={self.groups}, down_groups={self.down_groups}, "
            f"bias={self.has_bias}, scale={self.scale}"
        )


class RepAdapter(BottleneckAdapter):
    """RepAdapter (Luo et al. 2023, https://arxiv.org/abs/2302.08106): f(Z) = Z + s psi_u(psi_d(Z)), half of Table 3's
    row 10.

    The same parameters as the Bottleneck Adapter; what it has more is the fixed factor `scale`. Row 10 puts LoRA in the
    LLM and this into the ViT: `llm: none` gives its ViT half.

    Without `residual`, f(Z) = s psi_u(psi_d(Z)): what LaVIN's code (`lavin/mm_adapter.py`) puts into the ViT as its
    `normal` adapter. It starts at zero, not as the identity, so that a sublayer behind it begins with its biases alone.
    """

    settings = BottleneckAdapter.settings | {"scale", "residual"}

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__(width, config)
        self.residual = config.residual
        if not self.residual and self.impl == "triton":
            raise InputError(
                "model.adapter.impl: found 'triton', but its kernel always adds the residual, and "
                "model.adapter.residual is false; take auto or torch"
            )

    def forward(self, z: Tensor, norm: nn.Module | None = None) -> Tensor:
        """`z` [..., d] -> [..., d]: f(z), or f(norm(z))."""
        if self.residual:
            return super().forward(z, norm)
        z = z if norm is None else normalised(norm, z)
        hidden = F.linear(z, grouped_matrix(self.down_weight), self.down_bias)
        if self.active_dropout > 0:
            hidden = F.dropout(hidden, self.active_dropout)
        return self.scale * F.linear(hidden, grouped_matrix(self.up_weight), self.up_bias)

    def may_fuse(self) -> bool:
        return self.residual and super().may_fuse()

    def low_rank_map(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.residual:
            raise InputError(
                "model.adapter.residual: found False: without the residual, a repadapter changes the layer behind "
                "it by a matrix of full rank, which no LoRA can express"
            )
        return super().low_rank_map()

    @torch.no_grad()
    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        matrix, offset = super().linear_map()
        return (
            matrix if self.residual else matrix - torch.eye(self.width, dtype=matrix.dtype, device=matrix.device)
        ), offset
