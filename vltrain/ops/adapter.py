"""Adapters as functions of tensors, so that fused kernels can take their place.

The grouped up projection is laid out as a block-diagonal matrix and run as one dense product: with a bottleneck of some
16 numbers the step is bound by reading Z and writing the result, and a batched product per group would add a
transposing copy of it. Trade-off: (k - 1) times the multiplications of the grouped form, too few to be seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matrix(weight: Tensor) -> Tensor:
    """Block-diagonal matrix [out, in] of a grouped projection's `weight` [groups, out / groups, in / groups]."""
    return weight[0] if len(weight) == 1 else torch.block_diag(*weight)


def bottleneck_adapter(
    z: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Eq. 1-2: Z + s psi_u(psi_d(Z)), without a non-linearity; s is 1 in the paper.

    Args:
        z: [..., d].
        down_weight, down_bias: psi_d, [k_d, h / k_d, d / k_d] and [h].
        up_weight, up_bias: psi_u, [k_u, d / k_u, h / k_u] and [d]; biases may be None.
        dropout: probability with which each of the h numbers is dropped; 0 outside training.

    Returns: [..., d], in the dtype of autocast where that is on.
    """
    flat = z.flatten(0, -2)
    hidden = F.linear(flat, grouped_matrix(down_weight), down_bias)
    if dropout > 0:
        hidden = F.dropout(hidden, dropout)
    result = torch.addmm(flat, hidden, grouped_matrix(up_weight).t(), alpha=scale)
    if up_bias is None:
        return result.view_as(z)
    return result.add(up_bias.to(result.dtype), alpha=scale).view_as(z)


def routed_adapter(
    z: Tensor,
    weights: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Z + s sum_e w_e (U_e z + b_e), z = D Z + c: experts on one bottleneck under given weights.

    Args:
        z: [..., d].
        weights: w, broadcasting to [..., E].
        down_weight, down_bias: D [h, d] and c [h].
        up_weight, up_bias: U [E, d, h] and b [E, d]; biases may be None.

    Returns: [..., d]. All experts and their biases are one product with the weighted bottlenecks side by side.
    """
    flat = z.flatten(0, -2)
    hidden = F.linear(flat, down_weight, down_bias)
    if dropout > 0:
        hidden = F.dropout(hidden, dropout)
    weights = weights.expand(*z.shape[:-1], len(up_weight)).flatten(0, -2).to(hidden.dtype)
    weighted, experts = (
        (weights[:, :, None] * hidden[:, None, :]).flatten(1),
        up_weight.transpose(1, 2).flatten(0, 1),
    )  # [rows, E * h], [E * h, d]
    if up_bias is not None:
        weighted, experts = torch.cat([weighted, weights], dim=1), torch.cat([experts, up_bias])  # E more of each
    return torch.addmm(flat, weighted, experts, alpha=scale).view_as(z)


def face_split(left: Tensor, right: Tensor) -> Tensor:
    """All products of a row's entries: [n, r] and [n, r] -> [n, r * r]."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)
