"""Adapters: small trained modules behind the norms of a frozen network.

An adapter is put in by replacement: a block's norm becomes `Sequential(norm, adapter)`, so that no forward is patched and
checkpointing, compilation and ZeRO's hooks see ordinary modules. A new adapter is a class here and a line in `ADAPTERS`.
Every adapter starts as the identity, so that training starts from the pretrained network's function.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vltrain.config import AdapterConfig
from vltrain.errors import InputError, nearest
from vltrain.models.random import seeded
from vltrain.ops.adapter import bottleneck_adapter, grouped_matrix


class BottleneckAdapter(nn.Module):
    """The paper's Bottleneck Adapter, Eq. 1-2: g(Z) = Z + psi_u(psi_d(Z)), with no non-linearity.

    psi_d: Linear d -> h in `down_groups` groups (1: dense, as in Eq. 2); psi_u: Linear h -> d in `groups` groups. Each of k
    groups maps its own 1/k of the inputs to its own 1/k of the outputs. Parameters: d h / k_d + h + h d / k_u + d.
    Only the down weight starts non-zero (Xavier-uniform per group), so g starts as the identity.
    """

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        h, k_down, k_up = config.dim, config.down_groups, config.groups
        for name, groups in (("groups", k_up), ("down_groups", k_down)):
            if width % groups:
                raise InputError(
                    f"model.adapter.{name}: found {groups}, expected a divisor of the width {width} of the layers that get an adapter"
                )
        self.dropout = config.dropout
        self.down_weight = nn.Parameter(torch.empty(k_down, h // k_down, width // k_down))
        self.down_bias = nn.Parameter(torch.empty(h))
        self.up_weight = nn.Parameter(torch.empty(k_up, width // k_up, h // k_up))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for group in self.down_weight:
            nn.init.xavier_uniform_(group)
        for parameter in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor) -> Tensor:
        """`z` [..., d] -> [..., d]."""
        dropout = self.dropout if self.training else 0.0
        return bottleneck_adapter(z, self.down_weight, self.down_bias, self.up_weight, self.up_bias, dropout)

    def flops_per_row(self, input_needs_grad: bool) -> float:
        """Operations, forward and backward, for one row of `z`; see `vltrain.models.flops`."""
        down, up = self.down_weight.numel(), self.up_weight.numel()
        return 2.0 * (down * (2 + input_needs_grad) + up * 3)

    @torch.no_grad()
    def linear_map(self) -> tuple[Tensor, Tensor]:
        """(M [d, d], b [d]) in float64 with g(z) = M z + b, for merging: a linear layer (W, c) that reads g becomes
        (W M, W b + c)."""
        down, up = (grouped_matrix(weight.double()) for weight in (self.down_weight, self.up_weight))
        identity = torch.eye(len(self.up_bias), dtype=torch.float64, device=up.device)
        return identity + up @ down, up @ self.down_bias.double() + self.up_bias.double()

    def extra_repr(self) -> str:
        k_down, h, _ = self.down_weight.shape
        return f"{len(self.up_bias)}, dim={h * k_down}, groups={len(self.up_weight)}, down_groups={k_down}"


ADAPTERS: dict[str, Callable[[int, AdapterConfig], nn.Module]] = {"bottleneck": BottleneckAdapter}


def make_adapter(width: int, config: AdapterConfig) -> nn.Module:
    """The adapter that `config` asks for, for states of `width` numbers.

    Raises: InputError for an unknown kind or a width its groups do not divide.
    """
    if config.kind not in ADAPTERS:
        raise InputError(f"model.adapter.kind: found '{config.kind}'; {nearest(config.kind, ADAPTERS)}")
    return ADAPTERS[config.kind](width, config)


def insert_adapters(
    blocks: list[nn.Module], norms: dict[str, str], placement: str, config: AdapterConfig, seed: int, part: str
) -> None:
    """Puts an adapter behind the chosen norms of each block, in place.

    Args:
        blocks: the network's blocks, first to last.
        norms: the norm's attribute name by sublayer: {"attention": "input_layernorm", "ffn": ...}.
        placement: "none", "attention", "ffn" or "both".
        seed: of the adapters' random weights.
        part: "vision" or "llm"; with the block's number and the norm's name it makes the name behind the seed.
    """
    chosen = {"none": (), "both": ("attention", "ffn")}.get(placement, (placement,))
    for number, block in enumerate(blocks):
        for sublayer in chosen:
            norm = getattr(block, norms[sublayer])
            with seeded(seed, f"adapter/{part}/{number}/{sublayer}"):
                adapter = make_adapter(_width(norm), config)
            setattr(block, norms[sublayer], nn.Sequential(OrderedDict(norm=norm, adapter=adapter)))


def _width(norm: nn.Module) -> int:
    return norm.weight.shape[-1]
