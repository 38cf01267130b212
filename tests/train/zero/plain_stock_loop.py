"""The plain loop that ZeRO's runs of stock models are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.stock import row_of
from tests.train.worker import GRADIENT_STEP
from tests.train.zero.stock_worker import SAMPLES, STEPS
from vltrain.batch import Batch


def plain_loop(
    family: str,
    core: Any,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Batch], Tensor],
) -> dict[str, Tensor]:
    """No DeepSpeed, no packing, no accumulation: `loss_of` gives the summed loss of each sample's row alone.

    Returns: `losses`, `gradient/NAME` of one step and `weight/NAME` after the last, as `stock_worker` does.
    """
    losses, result = [], {}
    for step in range(STEPS):
        samples = SAMPLES[1:2] * 3 if step % 4 == 3 else SAMPLES
        rows = [
            row_of(family, core, [piece], seed=10 * place + number)
            for place, pieces in enumerate(samples) for number, piece in enumerate(pieces)
        ]  # fmt: skip
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = sum((loss_of(row) for row in rows), torch.zeros(())) / sum(row.num_label_tokens for row in rows)
        loss.backward()
        if step == GRADIENT_STEP:
            result |= {f"gradient/{name}": one.grad.clone() for name, one in trained.items() if one.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    result |= {f"weight/{name}": parameter.detach() for name, parameter in trained.items()}
    return {**result, "losses": torch.tensor(losses, dtype=torch.float64)}
