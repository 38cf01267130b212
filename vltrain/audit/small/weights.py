"""Random weights that make every mechanism matter: transformers' own, and noise on each, norms and biases included."""

from __future__ import annotations

import torch
from torch import nn

from vltrain.models.random import seeded

NOISE = 0.05
LOUDER = 8.0


@torch.no_grad()
def disturb(network: nn.Module, head: nn.Module, seed: int = 0) -> None:
    """Adds noise to every parameter in place, the same for one name whatever else the network has, and makes the
    `head`'s outputs as large as a trained one's, so that a cap on them counts. Packed weights stay as they are."""
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point():
            with seeded(seed, name):
                parameter.add_(NOISE * torch.randn(parameter.shape))
    for parameter in head.parameters():
        parameter.mul_(LOUDER)
