"""Rows taken, placed and summed by index, forward and backward the same bits every time and without a wait for the
device.

torch's own ways (`index_select` and its gradient, `index_copy`, `index_add`, `scatter_add`) either add with atomics on
CUDA, in whatever order threads come, or, under `torch.use_deterministic_algorithms`, look for the largest index first,
for which the host waits. What stands here uses gathers alone, and the gradient of an embedding, which sums equal
indices in a fixed order on every device, switch or no switch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vltrain.ops.transfer import to_device


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`, where an index may come several times.

    Args:
        rows: [N, ...], floating point.
        index: int64 [K], each below N.

    Returns: [K, ...]. A row's gradient is the sum over its places in `index`, in their order on a CPU; zero where it
    has none.
    """
    return F.embedding(index, rows.flatten(1)).view(len(index), *rows.shape[1:])


def place_rows(states: Tensor, rows: Tensor, holds: Tensor) -> Tensor:
    """`states` with the i-th of `rows` in the i-th place where `holds` is true.

    Args:
        states: [T, d].
        rows: [K, d] of the dtype of `states`; K is the number of places. With none of them the result still depends on
            `rows`.
        holds: bool [T].
    """
    return _PlacedRows.apply(states, rows, holds)


def owners(segment_lengths: Tensor, device: torch.device) -> Tensor:
    """int64 [T]: the segment of each token of a packed row. `segment_lengths` int64 [S] on the CPU."""
    return to_device(torch.repeat_interleave(torch.arange(len(segment_lengths)), segment_lengths), device)


def segment_sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums of `values` [L], floating point, by their `owner` int64 [L]: [count], without gradient. Each sums its values
    in their order."""
    # The gradient of an embedding of one column: it adds up what comes to each row.
    return torch.ops.aten.embedding_dense_backward(values.detach()[:, None], owner, count, -1, False).squeeze(1)


class _PlacedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, holds: Tensor) -> Tensor:
        ctx.save_for_backward(holds)
        ctx.num_rows = len(rows)
        if len(rows) == 0:
            return states.view_as(states)
        number = (holds.cumsum(0) - 1).clamp(min=0)  # of the row that stands there, where one does
        return torch.where(holds[:, None], rows.index_select(0, number), states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (holds,) = ctx.saved_tensors
        states_grad = gradient.masked_fill(holds[:, None], 0) if ctx.needs_input_grad[0] else None
        rows_grad = gradient.index_select(0, nonzero_indices(holds, ctx.num_rows)) if ctx.needs_input_grad[1] else None
        return states_grad, rows_grad, None


def nonzero_indices(holds: Tensor, count: int) -> Tensor:
    """Where `holds` (bool [T]) is true, int64 [count]. That it is `count` times is known: the device need not be
    asked."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=holds.device)
    return torch.nonzero_static(holds, size=count).squeeze(1)
