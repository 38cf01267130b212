"""What every adapter is: a module that keeps a state's shape, starts as the identity, and knows what it costs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vltrain.config.model.mmt import AdapterConfig
from vltrain.errors import InputError
from vltrain.models.adapters.norms import RmsForm, rms_form
from vltrain.models.adapters.routing import Routing


class Adapter(nn.Module):
    """Maps states [..., d] to [..., d], at the start each to itself. All of its parameters are trained.

    A subclass lists in `settings` the fields of `AdapterConfig` that it reads, so that one which has no effect can be
    refused.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    routed: ClassVar[bool] = False
    """Whether it asks for the modality of a position; see `vltrain.models.adapters.routing`."""

    takes_norm: ClassVar[bool] = False
    """Whether its forward can be given the norm before it, to run both in one kernel."""
    norm_form: RmsForm | None = None
    """What that norm computes, where the kernel knows it: see `take_norm`."""

    def __init__(self, width: int, config: AdapterConfig, routing: Routing | None = None) -> None:
        super().__init__()
        self.width, self.dim, self.dropout, self.scale = width, config.dim, config.dropout, config.scale
        self.has_bias = config.bias

    def may_fuse(self) -> bool:
        """Whether the fused kernel may compute it, here and with its settings."""
        return False

    def take_norm(self, norm: nn.Module) -> bool:
        """Looks at the norm right before it, which its forward will be given. Returns whether the kernel takes it in: a
        frozen RMSNorm, where the kernel may run."""
        frozen = not any(parameter.requires_grad for parameter in norm.parameters())
        self.norm_form = rms_form(norm) if self.may_fuse() and frozen else None
        return self.norm_form is not None

    def reset_parameters(self) -> None:
        """Draws the starting weights from torch's generator; the adapter is the identity afterwards."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def flops_per_row(self, input_needs_grad: bool) -> float:
        """Operations of the matrix products, forward and backward, for one row of `z`; see `vltrain.models.flops`."""
        raise NotImplementedError

    def bias_parameter(self, *shape: int) -> nn.Parameter | None:
        """A bias whose numbers are still to be drawn; None in an adapter without biases."""
        return nn.Parameter(torch.empty(shape)) if self.has_bias else None

    @staticmethod
    def zero(*parameters: nn.Parameter | None) -> None:
        """Sets to zero those that are there."""
        for parameter in parameters:
            if parameter is not None:
                nn.init.zeros_(parameter)

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0


def require_divisible(width: int, config: AdapterConfig, name: str, parts: int = 1) -> int:
    """The number of groups that `config` names, after checking that each of `parts` equal pieces of `width` divides
    into them.

    Raises: InputError.
    """
    groups = getattr(config, name)
    if width % (groups * parts):
        raise InputError(
            f"model.adapter.{name}: found {groups}, expected a divisor of the width "
            f"{width // parts if width % parts == 0 else width} "
            "of the layers that get an adapter"
        )
    return groups
