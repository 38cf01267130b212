"""The bottleneck adapter as one function of tensors, so that a fused kernel can take its place.

The grouped up projection is laid out as a block-diagonal matrix and run as one dense product: with a bottleneck of some
16 numbers the step is bound by reading Z and writing the result, and a batched product per group would add a transposing
copy of it. What it gives up: (k - 1) times the multiplications of the grouped form, too few to be seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matrix(weight: Tensor) -> Tensor:
    """Block-diagonal matrix [out, in] of a grouped projection's `weight` [groups, out / groups, in / groups]."""
    return weight[0] if len(weight) == 1 else torch.block_diag(*weight)


def bottleneck_adapter(
    z: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor, dropout: float = 0.0
) -> Tensor:
    """Eq. 1-2: Z + psi_u(psi_d(Z)), without a non-linearity.

    Args:
        z: [..., d].
        down_weight, down_bias: psi_d, [k_d, h / k_d, d / k_d] and [h].
        up_weight, up_bias: psi_u, [k_u, d / k_u, h / k_u] and [d].
        dropout: probability with which each of the h numbers is dropped; 0 outside training.

    Returns: [..., d], in the dtype of autocast where that is on.
    """
    flat = z.flatten(0, -2)
    hidden = F.linear(flat, grouped_matrix(down_weight), down_bias)
    if dropout > 0:
        hidden = F.dropout(hidden, dropout)
    result = torch.addmm(flat, hidden, grouped_matrix(up_weight).t())
    return (result + up_bias.to(result.dtype)).view_as(z)
