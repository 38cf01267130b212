"""The truth that the hot path is tested against: the same functions, written as the equations read, in float64.

Slow on purpose: one group, one segment, one token after another, and no trick that a faster version shares. Each has
the signature of what it is the truth of.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def grouped_linear(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 2: [Z_1 W_1, ..., Z_k W_k] + b. `z` [..., in], `weight` [k, out / k, in / k], `bias` [out] -> [..., out]."""
    pieces = z.double().chunk(len(weight), dim=-1)
    return torch.cat(
        [piece @ matrix.double().t() for piece, matrix in zip(pieces, weight, strict=True)], dim=-1
    ) + _bias(bias)


def _bias(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias.double()


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
    """Eq. 1: Z + s psi_u(psi_d(Z)); see `vltrain.ops.adapter.bottleneck_adapter`. Without dropout only."""
    assert dropout == 0.0, "dropout has no truth to compare with"
    return z.double() + scale * grouped_linear(grouped_linear(z, down_weight, down_bias), up_weight, up_bias)


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
    """Z + s sum_e w_e (U_e (D Z + c) + b_e), a row and an expert at a time; see
    `vltrain.ops.adapter.routed_adapter`."""
    assert dropout == 0.0, "dropout has no truth to compare with"
    shape = z.shape
    z, weights = z.double().flatten(0, -2), weights.double().expand(*shape[:-1], len(up_weight)).flatten(0, -2)
    rows = []
    for row, row_weights in zip(z, weights, strict=True):
        hidden = down_weight.double() @ row + _bias(down_bias)
        biases = [None] * len(up_weight) if up_bias is None else up_bias
        for weight, matrix, bias in zip(row_weights, up_weight, biases, strict=True):
            row = row + scale * weight * (matrix.double() @ hidden + _bias(bias))
        rows.append(row)
    return torch.stack(rows).view(shape)


def loha_matrix(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    """(X1 Y1^T) o (X2 Y2^T) [out, in], of X [out, r] and Y [in, r]."""
    return (x1.double() @ y1.double().t()) * (x2.double() @ y2.double().t())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden @ weight.T)[label], summed, and each by itself; see
    `vltrain.ops.loss.linear_cross_entropy`."""
    logits = hidden.double() @ weight.double().t()
    losses = (
        torch.stack([-row.log_softmax(-1)[label] for row, label in zip(logits, labels, strict=True)])
        if len(labels)
        else logits.sum(-1)
    )
    return losses.sum(), losses.detach()


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Tensor,
    scaling: float | None = None,
    *,
    seen: Callable[[int, int, int], bool] = lambda segment, query, key: key <= query,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each segment of a row, one segment and one head at a time.

    Args:
        query: [1, H, T, D]; key, value: [1, H_kv, T, D].
        seen: (segment, query's place in it, key's place in it) -> does the query see the key?
        softcap, sinks: see `vltrain.ops.attention._of_packed_rows`.

    Returns: [1, T, H, D].
    """
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    share = query.shape[1] // key.shape[1]
    segments = zip(
        *(states[0].double().split(segment_lengths.tolist(), dim=1) for states in (query, key, value)), strict=True
    )
    rows = []
    for number, (q_HLD, k_HLD, v_HLD) in enumerate(segments):
        places = range(q_HLD.shape[1])
        hidden = torch.tensor([[not seen(number, i, j) for j in places] for i in places], device=query.device)
        heads = []
        for head, q_LD in enumerate(q_HLD):
            scores = q_LD @ k_HLD[head // share].t() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(hidden, -math.inf).exp()
            beside = 0.0 if sinks is None else sinks[head].double().exp()
            heads.append(weights / (weights.sum(-1, keepdim=True) + beside) @ v_HLD[head // share])
        rows.append(torch.stack(heads, dim=1))
    return torch.cat(rows)[None]
